"""What names say: references to the Hub, quantisation tags, parts of a split file. Pure; no disk, no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

# Hub names: letters, digits, "-", "_", "."; no leading dot, no "--" and no ".." (huggingface_hub's own rule).
_REF = re.compile(
    r"^(?P<owner>[A-Za-z0-9_][A-Za-z0-9._-]*)/(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)(?::(?P<tag>[^/:\s]+))?$"
)
_PASTED: Final = ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/")
_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})$")
# The tags that llama.cpp's quantize tool and the large uploaders write, as one token of a name.
_QUANT = re.compile(
    r"(?:^|[-._/])(?P<quant>(?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4))"
    r"(?=$|[-./])",
    re.IGNORECASE,
)
# What is taken where no quant is asked for: Q4_K_M, then what comes near it in size and quality.
PREFERRED: Final = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_K_XL", "Q4_K_L", "Q4_K_S", "MXFP4", "MXFP4_MOE", "NVFP4"),
    *("IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_K_M", "UD-Q5_K_XL", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q6_K_L"),
    *("Q8_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "BF16", "F16", "F32"),
)
DTYPES: Final = ("f32", "bf16", "f16", "int8")  # what a `quant` may say of a model folder
_PROJECTOR_PREFERRED: Final = ("F16", "BF16", "Q8_0", "F32")


@dataclass(frozen=True, slots=True)
class HubRef:
    """owner/repo, and after a colon the quant (or, where a repository has several models, the name) wanted of it."""

    repo: str
    tag: str | None = None
    only: str | None = None  # the one format (disk.GGUF ...) that will do

    @property
    def weights(self) -> bool:
        """A folder of weights will do: without a tag, or with one that says how they are to be loaded."""
        return self.tag is None or self.tag.lower() in DTYPES

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo


@dataclass(frozen=True, slots=True)
class Gguf:
    """One model made of GGUF files: a single file, or the parts of a split one in their order."""

    stem: str  # path without split suffix and ending
    parts: tuple[str, ...]
    missing: tuple[int, ...] = ()  # numbers of absent parts, from 1
    total: int = 1

    @property
    def quant(self) -> str | None:
        return quant_of(self.stem)

    @property
    def why_incomplete(self) -> str | None:
        if not self.missing:
            return None
        noun = "part" if len(self.missing) == 1 else "parts"
        numbers = ", ".join(map(str, self.missing))
        verb = "is" if len(self.missing) == 1 else "are"
        return f"{self.stem}.gguf is split in {self.total} and {noun} {numbers} {verb} missing"


def parse_ref(text: str) -> HubRef | None:
    """A reference to the Hub; None for anything that cannot be one ("/srv/x", "a.gguf", "../x")."""
    text = text.strip()
    for prefix in _PASTED:
        text = text.removeprefix(prefix)
    found = _REF.match(text.rstrip("/"))
    if not found or (text.lower().endswith(".gguf") and not found["tag"]):
        return None
    owner, name = found["owner"], found["name"]
    if any(bad in part for part in (owner, name) for bad in ("..", "--")) or owner.endswith(".") or name.endswith("."):
        return None
    return HubRef(f"{owner}/{name}", found["tag"])


def is_path(source: str) -> bool:
    """Says by its form that it is a path; "a/b" may be either and is looked for below models_dir first."""
    return source.startswith(("/", "~", "./", "../")) or source in (".", "..") or source.lower().endswith(".gguf")


def quant_of(name: str) -> str | None:
    """The last quant tag in a name, upper case: "Qwen3-8B-Q4_K_M" -> "Q4_K_M"; None where there is none."""
    found = [f["quant"] for f in _QUANT.finditer(name)]
    if not found:
        return None
    return str(found[-1]).upper().replace("FP16", "F16").replace("FP32", "F32")


def is_projector(name: str) -> bool:
    """An image (or audio) encoder that goes beside a model; llama.cpp itself knows them by this name."""
    return name.lower().endswith(".gguf") and "mmproj" in name.rpartition("/")[2].lower()


def is_model(name: str) -> bool:
    """A GGUF file that can be served: neither a projector nor an importance matrix."""
    base = name.rpartition("/")[2].lower()
    return base.endswith(".gguf") and "mmproj" not in base and "imatrix" not in base and not base.startswith(".")


def group(names: Iterable[str]) -> list[Gguf]:
    """The models among these file names (relative, with "/"), sorted; parts of a split file are one model."""
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for name in filter(is_model, names):
        stem = name[: -len(".gguf")]
        if found := _SPLIT.match(stem):
            parts.setdefault((found["stem"], int(found["total"])), {})[int(found["part"])] = name
        else:
            parts.setdefault((stem, 0), {})[1] = name
    models = []
    for (stem, total), present in sorted(parts.items()):
        missing = tuple(n for n in range(1, total + 1) if n not in present)
        models.append(Gguf(stem, tuple(present[n] for n in sorted(present)), missing, total or 1))
    return models


def tags(models: Sequence[Gguf]) -> dict[str, Gguf]:
    """Each model under one tag: its quant, or its file's name where it has none or shares it with another."""
    named: dict[str, Gguf] = {}
    for model in models:
        tag = model.quant
        if tag is None or tag in named:
            tag = model.stem.rpartition("/")[2]
        named[tag] = model
    return named


def pick(models: Sequence[Gguf], tag: str | None) -> tuple[str, Gguf] | None:
    """The model that a tag means, in whatever case, with its canonical tag; without a tag the preferred one."""
    named = tags(models)
    if tag is None:
        ranked = sorted(named, key=lambda t: (bool(named[t].missing), _rank(named[t].quant), t))
        return (ranked[0], named[ranked[0]]) if ranked else None
    want = tag.lower().removesuffix(".gguf")
    by_tag = {t.lower(): t for t in named}
    by_file = {m.stem.rpartition("/")[2].lower(): t for t, m in named.items()}
    found = by_tag.get(want) or by_file.get(want) or by_tag.get(f"ud-{want}")
    return (found, named[found]) if found else None


def pick_projector(names: Iterable[str]) -> str | None:
    """Of a repository's projectors the most precise that is cheap: F16 first."""

    def rank(name: str) -> tuple[int, str]:
        tag = quant_of(name[: -len(".gguf")]) or ""
        return (_PROJECTOR_PREFERRED.index(tag) if tag in _PROJECTOR_PREFERRED else len(_PROJECTOR_PREFERRED), name)

    return min(filter(is_projector, names), key=rank, default=None)


def gguf_repos(repo: str, owners: Sequence[str]) -> list[str]:
    """Where else a repository's GGUF files are looked for, most likely first."""
    owner, _, name = repo.partition("/")
    if name.lower().endswith("gguf"):
        return []
    others = [f"{o}/{n}-GGUF" for n in (name, f"{owner}_{name}") for o in owners]  # owner_name: bartowski's style
    return list(dict.fromkeys([f"{repo}-GGUF", *others]))


def _rank(quant: str | None) -> int:
    return PREFERRED.index(quant) if quant in PREFERRED else len(PREFERRED)
