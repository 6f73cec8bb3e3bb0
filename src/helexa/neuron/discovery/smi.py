"""NVIDIA GPUs through the `nvidia-smi` program, where NVML cannot be loaded (another libc, no binding).

Parsing is pure: text in, devices out. The formats are those of nvidia-smi(1): CSV without header and units from
--query-gpu, the list of -L, and the indented text of -q for what CSV does not have (CUDA version, MIG instances).
"""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from helexa.core.discovery import Device, DeviceHealth
from helexa.neuron.discovery.faults import DriverMismatch, NoGpu
from helexa.neuron.discovery.nvml import NO_MIG_INSTANCE

# Runs nvidia-smi with these arguments; (exit code, stdout and stderr together). NoGpu if there is no such program.
Runner = Callable[[Sequence[str]], tuple[int, str]]

FIELDS: Final[tuple[str, ...]] = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "memory.free",
    "utilization.gpu",
    "temperature.gpu",
    "mig.mode.current",
)
# Drivers before R510 (2022) do not know compute_cap, before R450 (2020) not MIG: then asked again without them.
_OLD_FIELDS: Final = tuple(f for f in FIELDS if f not in ("compute_cap", "mig.mode.current"))
_TIMEOUT_S: Final = 20  # loading the driver for the first time takes some seconds without persistence mode

# "...handle for GPU 0000:0B:00.0: Unknown Error"; newer drivers write "GPU0: 0000:0B:00.0: Unknown Error".
_LOST = re.compile(
    r"Unable to determine the device handle for GPU\s*(?:\d+: )?(?P<place>\S+): (?P<why>.+)", re.IGNORECASE
)
_CARD = re.compile(r"^GPU (?P<index>\d+): (?P<name>.+?) \(UUID: (?P<uuid>GPU-[^)]+)\)")
_INSTANCE = re.compile(r"^\s+MIG (?P<profile>\S+)\s+Device\s+(?P<index>\d+): \(UUID: (?P<uuid>MIG-[^)]+)\)")
_CUDA = re.compile(r"^CUDA (?:UMD )?Version\s*:\s*(?P<version>\d+\.\d+)", re.MULTILINE)
_MEMORY = re.compile(r"^(?P<key>Total|Used|Free)\s*:\s*(?P<mb>\d+) MiB")


@dataclass(frozen=True, slots=True)
class Card:
    """One row of --query-gpu. A field that nvidia-smi cannot tell is None."""

    index: int
    name: str
    uuid: str | None = None
    driver_version: str | None = None
    compute_capability: str | None = None
    total_mb: int | None = None
    used_mb: int | None = None
    free_mb: int | None = None
    utilization_pct: float | None = None
    temp_c: float | None = None
    mig: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """A MIG slice of a card."""

    name: str
    uuid: str
    total_mb: int | None = None
    used_mb: int | None = None
    free_mb: int | None = None


@dataclass(slots=True)
class Listing:
    """What `nvidia-smi -L` says: MIG instances by card, and the cards that do not answer."""

    cards: list[str] = field(default_factory=list)  # UUIDs
    instances: dict[int, list[tuple[str, str]]] = field(default_factory=dict)  # (profile, uuid)
    lost: dict[str, str] = field(default_factory=dict)  # PCI address -> why


class Tool:
    """The program, asked once for the devices and again for each `health`."""

    def __init__(self, runner: Runner) -> None:
        self._run = runner
        cards, instances, text = self._read()
        self.driver_version = next((c.driver_version for c in cards if c.driver_version), None)
        self.cuda_version = parse_cuda_version(text)
        self.devices, _ = combine(cards, instances)

    def health(self) -> list[DeviceHealth]:
        try:
            cards, instances, _ = self._read()
        except (NoGpu, DriverMismatch) as err:
            why = str(err) or "the NVIDIA driver was updated while neuron runs"
            return [DeviceHealth(index=d.index, error=why) for d in self.devices]
        now = list(zip(*combine(cards, instances), strict=True))
        return [_match(device, now) for device in self.devices]

    def process_mb(self, pid: int) -> dict[int, int]:
        try:
            _, out = self._run(["--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"])
        except NoGpu:
            return {}
        return parse_process_memory(out, pid, {d.uuid: d.index for d in self.devices if d.uuid})

    def _read(self) -> tuple[list[Card], dict[int, list[Instance]], str]:
        names = FIELDS
        code, out = self._query(names)
        if "is not a valid field to query" in out:
            names = _OLD_FIELDS
            code, out = self._query(names)
        check(code, out)
        cards = parse_cards(out, names)
        _, text = self._run(["-q"])
        listing = parse_listing(self._run(["-L"])[1]) if code or any(c.mig for c in cards) else Listing()
        # A lost card can end the whole query: the others are then asked for one by one.
        seen = {c.uuid for c in cards}
        for uuid in listing.cards:
            if uuid not in seen:
                cards += parse_cards(self._query(names, uuid)[1], names)
        cards += lost_cards(cards, listing.lost | parse_lost(out))
        if not cards:
            raise NoGpu(f"nvidia-smi lists no GPU ({out.strip().splitlines()[-1] if out.strip() else 'no output'})")
        return cards, join_instances(listing, parse_instance_memory(text)), text

    def _query(self, names: Sequence[str], uuid: str | None = None) -> tuple[int, str]:
        only = ["-i", uuid] if uuid else []
        return self._run([*only, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"])


def run(args: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as err:
        raise NoGpu("nvidia-smi is not installed") from err
    except subprocess.TimeoutExpired as err:
        raise NoGpu(f"nvidia-smi does not answer within {_TIMEOUT_S} s") from err
    return done.returncode, done.stdout


def check(code: int, out: str) -> None:
    """Raise for an answer that is about the driver and not about cards."""
    if "Driver/library version mismatch" in out:
        raise DriverMismatch
    if code and ("Failed to initialize NVML" in out or "couldn't communicate with the NVIDIA driver" in out):
        raise NoGpu(out.strip().splitlines()[0])


def parse_cards(out: str, names: Sequence[str] = FIELDS) -> list[Card]:
    """Rows of --query-gpu=names --format=csv,noheader,nounits; lines of another form are passed over."""
    cards = []
    for row in csv.reader(out.splitlines(), skipinitialspace=True):
        if len(row) != len(names) or not row[0].strip().isdigit():
            continue
        value = dict(zip(names, map(known, row), strict=True))
        bad = [name for name, text in zip(names, row, strict=True) if _bad(text)]
        name = value["name"]
        cards.append(
            Card(
                index=int(row[0]),
                name=name or f"GPU {row[0]}",
                uuid=value["uuid"],
                driver_version=value["driver_version"],
                compute_capability=value.get("compute_cap"),
                total_mb=_int(value["memory.total"]),
                used_mb=_int(value["memory.used"]),
                free_mb=_int(value["memory.free"]),
                utilization_pct=_float(value["utilization.gpu"]),
                temp_c=_float(value["temperature.gpu"]),
                mig=value.get("mig.mode.current") == "Enabled",
                # One odd field is a field; a card that cannot tell its memory cannot be planned for.
                error=_card_error(row, names) if any(n.startswith("memory.") for n in bad) else None,
            )
        )
    return cards


def parse_listing(out: str) -> Listing:
    listing = Listing(lost=parse_lost(out))
    card = -1
    for line in out.splitlines():
        if found := _CARD.match(line):
            card = int(found["index"])
            listing.cards.append(found["uuid"])
        elif (found := _INSTANCE.match(line)) and card >= 0:
            listing.instances.setdefault(card, []).append((found["profile"], found["uuid"]))
    return listing


def parse_lost(out: str) -> dict[str, str]:
    """PCI address -> sentence, of "Unable to determine the device handle for GPU 0000:0B:00.0: ..." lines."""
    return {
        found["place"]: f"the driver cannot open the GPU at {found['place']} ({found['why'].strip()}); see `dmesg`"
        for found in map(_LOST.search, out.splitlines())
        if found
    }


def parse_cuda_version(text: str) -> str | None:
    found = _CUDA.search(text)
    return found["version"] if found else None


def parse_instance_memory(text: str) -> list[list[dict[str, int]]]:
    """Of `nvidia-smi -q`: per card, in order, the FB memory (Total, Used, Free in MB) of each of its MIG devices."""
    cards: list[list[dict[str, int]]] = []
    in_instance = in_memory = False
    for line in text.splitlines():
        indent, stripped = len(line) - len(line.lstrip()), line.strip()
        if line.startswith("GPU "):
            cards.append([])
            in_instance = False
        elif cards and indent <= 4 and stripped:  # a section of the card
            in_instance = stripped == "MIG Device"
            if in_instance:
                cards[-1].append({})
            in_memory = False
        elif in_instance and indent == 8:
            in_memory = stripped == "FB Memory Usage"
        elif in_instance and in_memory and (found := _MEMORY.match(stripped)):
            cards[-1][-1][found["key"]] = int(found["mb"])
    return cards


def parse_process_memory(out: str, pid: int, index_by_uuid: Mapping[str, int]) -> dict[int, int]:
    """Rows "GPU-..., 4242, 1834" of --query-compute-apps; device index -> MB."""
    held: dict[int, int] = {}
    for row in csv.reader(out.splitlines(), skipinitialspace=True):
        if len(row) != 3 or row[1].strip() != str(pid) or row[0].strip() not in index_by_uuid:
            continue
        used = _int(known(row[2]))
        if used is not None:
            index = index_by_uuid[row[0].strip()]
            held[index] = held.get(index, 0) + used
    return held


def join_instances(listing: Listing, memory: list[list[dict[str, int]]]) -> dict[int, list[Instance]]:
    joined: dict[int, list[Instance]] = {}
    for card, found in listing.instances.items():
        sizes = memory[card] if card < len(memory) else []
        for position, (profile, uuid) in enumerate(found):
            size = sizes[position] if position < len(sizes) else {}
            joined.setdefault(card, []).append(
                Instance(f"MIG {profile}", uuid, size.get("Total"), size.get("Used"), size.get("Free"))
            )
    return joined


def lost_cards(cards: Sequence[Card], lost: Mapping[str, str]) -> list[Card]:
    """Cards that are named only in an error line get the indices that no row has."""
    taken = {c.index for c in cards}
    free = (i for i in range(len(taken) + len(lost)) if i not in taken)
    return [Card(index=i, name=f"GPU {i}", error=lost[place]) for i, place in zip(free, sorted(lost), strict=False)]


def combine(cards: Sequence[Card], instances: dict[int, list[Instance]]) -> tuple[list[Device], list[DeviceHealth]]:
    """Numbered as they are used: cards in order, a card with MIG on replaced by its instances."""
    devices: list[Device] = []
    health: list[DeviceHealth] = []
    for card in sorted(cards, key=lambda c: c.index):
        slices = instances.get(card.index, []) if card.mig else []
        for part in slices:
            devices.append(
                Device(
                    index=len(devices),
                    name=f"{card.name} {part.name}",
                    kind="cuda",
                    uuid=part.uuid,
                    vram_total_mb=part.total_mb,
                    compute_capability=card.compute_capability,
                )
            )
            health.append(
                DeviceHealth(
                    index=len(health), vram_used_mb=part.used_mb, vram_free_mb=part.free_mb, temp_c=card.temp_c
                )
            )
        if slices:
            continue
        error = NO_MIG_INSTANCE if card.mig else card.error
        devices.append(
            Device(
                index=len(devices),
                name=card.name,
                kind="cuda",
                uuid=card.uuid,
                vram_total_mb=card.total_mb,
                compute_capability=card.compute_capability,
                error=error,
            )
        )
        health.append(
            DeviceHealth(
                index=len(health),
                vram_used_mb=card.used_mb,
                vram_free_mb=card.free_mb,
                utilization_pct=card.utilization_pct,
                temp_c=card.temp_c,
                error=error,
            )
        )
    return devices, health


def _match(device: Device, now: Sequence[tuple[Device, DeviceHealth]]) -> DeviceHealth:
    """The new reading of `device`: the same UUID, else the same index where one side has no UUID (a lost card)."""
    for same, health in now:
        if device.uuid is not None and same.uuid == device.uuid:
            return msgspec.structs.replace(health, index=device.index)
    for same, health in now:
        if same.index == device.index and None in (device.uuid, same.uuid):
            return health
    return DeviceHealth(index=device.index, error="this GPU is no longer listed by nvidia-smi")


def known(text: str) -> str | None:
    """None for what nvidia-smi writes where it has no value: [N/A], [Not Supported], [Unknown Error], ERR!, ..."""
    text = text.strip()
    return None if not text or text.startswith("[") or text in ("N/A", "ERR!") else text


def _bad(text: str) -> bool:
    text = text.strip()
    return text == "ERR!" or (text.startswith("[") and text not in ("[N/A]", "[Not Supported]"))


def _card_error(row: Sequence[str], names: Sequence[str]) -> str:
    text = next(t.strip().strip("[]") for n, t in zip(names, row, strict=True) if n.startswith("memory.") and _bad(t))
    return f"the driver cannot read this GPU ({text}); see `dmesg`, reset it (`nvidia-smi --gpu-reset`) or reboot"


def _int(text: str | None) -> int | None:
    value = _float(text)
    return None if value is None else int(value)


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
