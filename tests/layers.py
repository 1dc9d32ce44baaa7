"""Which modules may import which: a table that `layout.py` reads.

cli -> pretrain, integrations -> nn, gradcache, batch, planning -> ops.<family>.api -> ops.<family>.op
    -> triton_*, runtime
"""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("attention", "contrastive", "packing")
# Smaller ops beside a family's own, each a folder with the same files; documented in a section of the family's page.
PARTS = {"attention": ("additive", "gate", "rope")}

_PYTORCH = frozenset({"torch", "numpy"})
_EXTRAS = frozenset({"PIL", "tyro", "tqdm", "matplotlib", "tensorboard", "safetensors", "jinja2", "tokenizers"})


@dataclass(frozen=True)
class Layer:
    """What the modules of one layer may import.

    Args:
        module: pattern of the layer's modules; group `f` is the family.
        below: modules of this package, "x.*" for x and all in it, "{f}" for the module's own family, "{any}" for any.
        never: exceptions from `below`.
        packages: other packages.
        late: of all these, what must not be imported at the top: the module works without it.
    """

    module: str
    below: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    packages: frozenset[str] = _PYTORCH
    late: tuple[str, ...] = ()


_OPS = r"mmkernels\.ops\.(?P<f>\w+)"
_OPS_OR_PART = _OPS + rf"(\.({'|'.join(part for parts in PARTS.values() for part in parts)}))?"
_OWN, _SHARED, _RUNTIME = (
    "mmkernels.ops.{f}.*",
    ("mmkernels.ops.checks", "mmkernels.ops.dtypes", "mmkernels.ops.modality"),
    "mmkernels.runtime.*",
)
_FUNCTIONS = ("mmkernels.ops.{any}", "mmkernels.ops.{any}.api", *_SHARED)

# The bench suite measures ops by their public functions, and compares with what a user would write without them.
_BENCH = ("mmkernels", "mmkernels.bench.*", "mmkernels.ops.contrastive.*", "mmkernels.testing.*", *_FUNCTIONS, _RUNTIME)
_PEERS = frozenset(
    {"fbgemm_gpu", "flash_attn", "inf_cl", "lightbinpack", "liger_kernel", "memeff", "numba", "open_clip", "pyarrow"}
    | {"sentence_transformers", "siglip_kernel", "torchtune", "trl", "xformers"}
)

# The first match is a module's layer.
LAYERS = (
    Layer(
        r"mmkernels",
        below=(
            "mmkernels.ops.{any}",
            "mmkernels.ops.modality",
            "mmkernels.batch",
            "mmkernels.gradcache",
            "mmkernels.nn",
            "mmkernels.planning",
            "mmkernels.runtime.backends",
            "mmkernels.runtime.machine",
            "mmkernels.runtime.received",
        ),
        packages=frozenset({"torch"}),
    ),
    Layer(
        r"mmkernels\.cli",
        below=("mmkernels", "mmkernels.bench.*", "mmkernels.info", "mmkernels.plan_cli.*", "mmkernels.pretrain.*"),
        packages=frozenset({"tyro"}),
        late=("tyro", "mmkernels.bench", "mmkernels.plan_cli", "mmkernels.pretrain"),
    ),
    Layer(
        r"mmkernels\.bench\.cases\.pretrain(_\w+)?",
        below=(*_BENCH, "mmkernels.nn", "mmkernels.pretrain.*"),
        late=("mmkernels.pretrain",),
    ),
    Layer(
        r"mmkernels\.bench\.(\w*peers)",
        below=("mmkernels.bench.*",),
        packages=_PYTORCH | _PEERS,
        late=tuple(sorted(_PEERS)),
    ),
    Layer(
        r"mmkernels\.bench(\..*)?",
        below=_BENCH,
        packages=_PYTORCH | {"jinja2", "markupsafe", "pytest", "tabulate", "tyro"},
    ),
    Layer(
        r"mmkernels\.plan_cli(\..*)?",
        below=("mmkernels", "mmkernels.plan_cli.*"),
        packages=_PYTORCH | {"tyro", "tabulate", "matplotlib", "pyarrow"},
        late=("pyarrow", "mmkernels.plan_cli.picture"),
    ),
    Layer(r"mmkernels\.info", below=("mmkernels", _RUNTIME), late=("torch", "numpy", "mmkernels.runtime")),
    Layer(
        r"mmkernels\.pretrain\.data_report(\..*)?",
        below=("mmkernels", "mmkernels.pretrain.*"),
        packages=_PYTORCH | _EXTRAS | {"imagehash", "datasketch", "py3langid", "sklearn", "scipy"},
    ),
    Layer(
        r"mmkernels\.pretrain(\..*)?",
        below=("mmkernels", "mmkernels.nn", "mmkernels.pretrain.*"),
        never=("mmkernels.pretrain.data_report.*",),
        packages=_PYTORCH | _EXTRAS | {"pyarrow", "soundfile", "datasets", "zstandard", "sacrebleu", "rouge_score"},
        late=("pyarrow", "soundfile", "datasets", "zstandard", "sacrebleu", "rouge_score"),
    ),
    Layer(
        r"mmkernels\.integrations\.open_clip\.model",
        below=("mmkernels", "mmkernels.pretrain.*"),
        packages=_PYTORCH | {"open_clip"},
    ),
    Layer(
        r"mmkernels\.integrations\.open_clip(\..*)?",
        below=("mmkernels", "mmkernels.integrations.open_clip.*"),
        packages=_PYTORCH | {"open_clip", "open_clip_train"},
        late=("mmkernels.integrations.open_clip.model",),
    ),
    Layer(
        r"mmkernels\.integrations\.datasets",
        below=("mmkernels",),
        packages=_PYTORCH | {"datasets", "pyarrow"},
    ),
    Layer(
        r"mmkernels\.integrations\.energon",
        below=("mmkernels", "mmkernels.integrations.torch_collate"),
        packages=_PYTORCH | {"megatron"},
    ),
    Layer(
        r"mmkernels\.integrations(\..*)?",
        below=("mmkernels", "mmkernels.nn", "mmkernels.gradcache", "mmkernels.integrations.*"),
        packages=_PYTORCH | {"datasets", "sentence_transformers", "transformers"},
    ),
    Layer(r"mmkernels\.nn(\..*)?", below=("mmkernels.nn.*", *_FUNCTIONS)),
    Layer(r"mmkernels\.gradcache(\..*)?", below=("mmkernels.gradcache.*", "mmkernels.runtime.groups", *_FUNCTIONS)),
    Layer(r"mmkernels\.batch(\..*)?", below=("mmkernels.batch.*", *_FUNCTIONS)),
    Layer(
        r"mmkernels\.planning(\..*)?",
        below=(
            "mmkernels.planning.*",
            "mmkernels.ops.checks",
            "mmkernels.ops.contrastive.choice",  # what the loss exchanges: the same code plans it
            "mmkernels.ops.contrastive.traffic",
            "mmkernels.runtime.collectives",
            "mmkernels.runtime.machine",
            "mmkernels.runtime.native",
        ),
    ),
    Layer(
        r"mmkernels\.testing\.aot",
        below=("mmkernels.ops", "mmkernels.testing.pairs"),
        packages=frozenset({"triton"}),
        late=("triton",),
    ),
    Layer(r"mmkernels\.testing(\..*)?", below=("mmkernels.testing.*", "mmkernels.ops.*", _RUNTIME)),
    Layer(r"mmkernels\.runtime\.native", below=("mmkernels._native", "mmkernels.runtime.absence")),
    Layer(r"mmkernels\.runtime(\..*)?", below=(_RUNTIME,)),
    Layer(r"mmkernels\.ops(\.(checks|dtypes|modality))?"),
    Layer(
        r"mmkernels\.ops\.triton_common", below=("mmkernels.runtime.backends",), packages=frozenset({"torch", "triton"})
    ),
    Layer(_OPS_OR_PART + r"\.types", packages=frozenset({"torch"})),
    Layer(
        _OPS_OR_PART + r"\.reference",
        below=("mmkernels.ops.dtypes", "mmkernels.ops.{f}.types"),
        packages=frozenset({"torch"}),
    ),
    Layer(
        _OPS_OR_PART + r"\.triton_\w+",
        below=(
            "mmkernels.ops.triton_common",
            "mmkernels.ops.{f}.*.triton_*",
            "mmkernels.ops.{f}.*.reference",
            "mmkernels.ops.{f}.types",
        ),
        packages=frozenset({"torch", "triton"}),
    ),
    Layer(
        _OPS_OR_PART + r"\.native",
        below=(_RUNTIME, "mmkernels.ops.dtypes", "mmkernels.ops.{f}.*.reference", "mmkernels.ops.{f}.types"),
    ),
    Layer(
        _OPS_OR_PART + r"\.op\w*",
        below=(_OWN, *_SHARED, _RUNTIME),
        never=("mmkernels.ops.{f}.*.api",),
        late=("mmkernels.ops.{f}.*.triton_*",),
    ),
    Layer(_OPS_OR_PART + r"(\.api)?", below=(_OWN, *_SHARED, _RUNTIME), never=("mmkernels.ops.{f}.*.triton_*",)),
    Layer(
        _OPS + r"\.plot",
        below=("mmkernels.ops.{f}.*", *_SHARED),
        never=("mmkernels.ops.{f}.api", "mmkernels.ops.{f}.triton_*"),
        packages=_PYTORCH | {"matplotlib"},
        late=("matplotlib",),
    ),
    Layer(
        _OPS_OR_PART + r"\.\w+",
        below=(_OWN, *_SHARED, _RUNTIME),
        never=("mmkernels.ops.{f}.*.api", "mmkernels.ops.{f}.*.triton_*"),
    ),
)
