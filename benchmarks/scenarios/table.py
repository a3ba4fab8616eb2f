"""The scenarios and their goals, as data. All goals are stated for 1 GB on two cores, and for asyncckpt's default configuration
unless `peer` says otherwise.
"""

from dataclasses import replace

from benchmarks import states
from benchmarks.scenarios.base import Scenario
from benchmarks.scenarios.goals import ASYNCHRONOUS, EVERYBODY, GoalSpec

MIB = 2**20
RAW = "asyncckpt-none"
PLANES = "asyncckpt-planes"
ASYNC = ("asyncckpt", "dcp-thread", "dcp-process", "torch_checkpointing")
DEFAULT_STAGING = ("dcp-thread-default", "dcp-process-default")
BLOCKING = ("dcp.save", "torch.save", "safetensors")
FOLDER = ("asyncckpt", RAW, PLANES, *ASYNC[1:], *BLOCKING)
CONNECTOR = ("s3torchconnector", "s3torchconnector-save")
S3 = ("asyncckpt", RAW, PLANES, *CONNECTOR, "torch.save+boto3")

BYTES = ("asyncckpt", RAW, PLANES, "s3torchconnector", "torch.save+boto3")

FIXED = GoalSpec("durable, of the time of the better fixed codec", "durable_s", 1.05, against=(RAW, PLANES))


def _calls(median_s: float, p99_s: float | None = None) -> tuple[GoalSpec, ...]:
    goals = [GoalSpec("save() returns, median seconds", "call_s", median_s)]
    if p99_s is not None:
        goals.append(GoalSpec("save() returns, 99th percentile, seconds", "call_p99_s", p99_s))
    return tuple(goals)


def _beside(loop: str) -> tuple[GoalSpec, ...]:
    return (
        GoalSpec("snapshot, of a plain copy's time beside the same loop", "staged_s", 1.2, of="copy_s"),
        GoalSpec("snapshot, of the best asynchronous peer's time", "staged_s", 1.0, against=(ASYNCHRONOUS,)),
        GoalSpec(f"speed of the {loop} loop while saving, of its own", "main_speed", 0.97, at_least=True),
        GoalSpec(
            f"speed of the {loop} loop, of that beside the best peer",
            "main_speed",
            1.0,
            at_least=True,
            against=(EVERYBODY,),
        ),
        GoalSpec("longest gap above the quiet windows' longest, seconds", "gap_above_quiet_s", 0.005),
    )


def _durable(limit: float, *against: str, peer: str = "asyncckpt") -> GoalSpec:
    best = against[0] if against[0].startswith("best") else f"best of {', '.join(against)}"
    return GoalSpec(f"durable, of the time of the {best}", "durable_s", limit, against=against, peer=peer)


def _disk(name: str, dtype: str, state: states.StateSpec, limit: float) -> Scenario:
    return Scenario(
        name,
        f"1 GB to the real disk, everybody synced: {dtype}",
        (state,),
        peers=("asyncckpt", "dcp-thread", "torch.save"),
        full_peers=FOLDER,
        store="disk",
        full_rounds=3,
        goals=(_durable(limit, EVERYBODY), FIXED),
        quick=False,
    )


def _sized(*gigabytes: float) -> tuple[states.StateSpec, ...]:
    return tuple(replace(states.DENSE, name=f"{gb:g} GB fp32 + AdamW").resized(gb) for gb in gigabytes)


_ALL = (
    Scenario(
        "calls",
        "how long save() holds the caller: 1 GB in 150 tensors, idle main thread",
        (states.FEW,),
        full_peers=("asyncckpt", "dcp-thread", "dcp-process"),
        rounds=3,
        full_rounds=60,
        uncounted=2,
        settles=False,
        goals=_calls(0.5e-3, 2e-3),
        quick=False,
    ),
    Scenario(
        "idle",
        "1 GB beside an idle main thread, in memory: save, restore, one tensor",
        (states.DENSE,),
        peers=("asyncckpt", "dcp-thread", "torch_checkpointing", "torch.save"),
        full_peers=("asyncckpt", RAW, PLANES, "asyncckpt-1worker", *ASYNC[1:], *DEFAULT_STAGING, *BLOCKING),
        rounds=2,
        full_rounds=3,
        goals=(
            _durable(1.0, ASYNCHRONOUS),
            _durable(0.8, ASYNCHRONOUS, peer=RAW),
            FIXED,
            GoalSpec("restore, verified, of dcp.load's time", "restore_s", 0.65, against=("dcp-thread", "dcp.save")),
            GoalSpec("restore, verified, of torch.load(mmap=True)'s", "restore_s", 2.0, against=("torch.save",)),
        ),
    ),
    Scenario(
        "python",
        "1 GB beside a main thread in pure Python, which never lets go of the GIL by itself",
        (states.DENSE,),
        peers=("asyncckpt", "dcp-thread"),
        full_peers=(*ASYNC, *DEFAULT_STAGING, "torch.save"),
        loop="python",
        rounds=1,
        full_rounds=3,
        goals=(_durable(0.35, ASYNCHRONOUS), *_beside("python")),
    ),
    Scenario(
        "torch",
        "1 GB beside a main thread of small torch operations",
        (states.DENSE,),
        peers=("asyncckpt", "dcp-thread"),
        full_peers=("asyncckpt", RAW, PLANES, *ASYNC[1:], *DEFAULT_STAGING),
        loop="torch",
        rounds=2,
        goals=(_durable(1.2, ASYNCHRONOUS), FIXED, *_beside("torch")),
        quick=False,
    ),
    Scenario(
        "train",
        "1 GB beside training on all cores: what a step waits, and how training goes on",
        (states.DENSE,),
        peers=("asyncckpt", "dcp-thread"),
        full_peers=(*ASYNC, *DEFAULT_STAGING, "torch.save"),
        loop="train",
        rounds=2,
        kind="alone",
        goals=_beside("training"),
        quick=False,
    ),
    Scenario(
        "small",
        "20,000 tensors of 10 kB, idle main thread: what a tensor costs, apart from its bytes",
        (states.SMALL,),
        peers=("asyncckpt", "dcp-thread"),
        full_peers=FOLDER,
        rounds=1,
        full_rounds=3,
        settles=False,
        goals=(*_calls(20e-3), _durable(0.05, "dcp-thread", "dcp-process", "dcp.save")),
    ),
    Scenario(
        "many",
        "100,000 tensors of 2 kB, idle main thread",
        (states.MANY,),
        peers=("asyncckpt",),
        rounds=3,
        uncounted=2,
        goals=(*_calls(80e-3), GoalSpec("durable, seconds", "durable_s", 1.0)),
        quick=False,
    ),
    _disk("disk", "fp32", states.DENSE, 0.85),
    _disk("disk-bf16", "bf16", states.DENSE_BF16, 0.7),
    Scenario(
        "wan",
        "1 GB to S3 behind 30 ms and 90 MB/s a connection, and back",
        (states.DENSE,),
        peers=("asyncckpt", "s3torchconnector"),
        full_peers=S3,
        store="wan",
        rounds=1,
        full_rounds=2,
        goals=(
            _durable(0.4, *CONNECTOR),
            FIXED,
            GoalSpec("durable, of the time of its bytes on plain connections", "durable_s", 1.25, of="plain_put_s"),
            GoalSpec("restore, of the time of its bytes on plain connections", "restore_s", 1.25, of="plain_get_s"),
        ),
    ),
    Scenario(
        "sink",
        "1 GB to a cheap S3 server on loopback: what a put costs the client",
        (states.DENSE,),
        peers=("asyncckpt", PLANES),
        full_peers=S3,
        store="sink",
        rounds=3,
        full_rounds=3,
        goals=(GoalSpec("client's CPU seconds per GB put, nothing else", "put_cpu_s_per_gb", 0.35), FIXED),
        quick=False,
    ),
    Scenario(
        "rclone",
        "1 GB to rclone's S3 server on loopback",
        (states.DENSE,),
        peers=("asyncckpt", "s3torchconnector"),
        full_peers=S3,
        store="rclone",
        full_rounds=2,
        goals=(FIXED,),
        quick=False,
    ),
    Scenario(
        "memory",
        "memory above a state of 1 GB, saves one after the other",
        (states.DENSE,),
        full_peers=FOLDER,
        kind="memory",
        rounds=3,
        full_rounds=4,
        goals=(GoalSpec("most bytes above the state and its copy", "peak_beyond_state_bytes", 256 * MIB),),
        quick=False,
    ),
    Scenario(
        "flat",
        "memory and descriptors over many saves of 100 MB",
        (states.SERIAL,),
        kind="memory",
        rounds=10,
        full_rounds=500,
        goals=(
            GoalSpec("most bytes above those after the fifth save", "growth_bytes", 20e6),
            GoalSpec("descriptors more or less than after the fifth save", "descriptor_drift", 0),
        ),
        quick=False,
    ),
    Scenario(
        "bytes",
        "bytes stored of a state of a real run: fp32 + AdamW",
        (states.TRAINED,),
        full_peers=BYTES,
        store="slow",
        goals=(GoalSpec("stored bytes, of raw bytes", "stored_ratio", 0.84),),
        quick=False,
    ),
    Scenario(
        "bytes-bf16",
        "bytes stored of a state of a real run: bf16 weights",
        (states.TRAINED_BF16,),
        full_peers=BYTES,
        store="slow",
        goals=(GoalSpec("stored bytes, of raw bytes", "stored_ratio", 0.68),),
        quick=False,
    ),
    Scenario(
        "bytes-bf16-adamw",
        "bytes stored of a state of a real run: bf16 with AdamW's moments in bf16",
        (states.TRAINED_BF16_ADAMW,),
        full_peers=BYTES,
        store="slow",
        quick=False,
    ),
    Scenario(
        "auto",
        'what codec="auto" costs: 60 saves of 100 MB behind the first one, trials included',
        (states.SERIAL,),
        peers=("asyncckpt", RAW, PLANES),
        rounds=60,
        settles=False,
        goals=(
            GoalSpec(
                "mean of durable, of that of the better fixed codec", "durable_mean_s", 1.05, against=(RAW, PLANES)
            ),
        ),
        quick=False,
    ),
    Scenario(
        "codec",
        "encoders alone, one thread: ratio and speed on states of a real run",
        (states.TRAINED, states.TRAINED_BF16, states.TRAINED_BF16_ADAMW),
        peers=("asyncckpt", "zipnn", "zstd-1"),
        kind="codec",
        rounds=5,
        full_rounds=15,
        goals=(
            GoalSpec("encoding speed, of ZipNN's", "encode_gb_per_s", 3.0, at_least=True, against=("zipnn",)),
            GoalSpec("stored ratio, of ZipNN's", "stored_ratio", 1.01, against=("zipnn",)),
        ),
        quick=False,
    ),
    Scenario(
        "shapes",
        "other states: bf16, one large tensor, mostly frozen",
        (states.WEIGHTS_BF16, states.DENSE_BF16, states.LARGE, states.FROZEN),
        peers=("asyncckpt", PLANES, "dcp-thread", "torch.save"),
        quick=False,
    ),
    Scenario(
        "sizes",
        "time per GB from 0.3 to 4 GB",
        _sized(0.3, 1, 2, 4),
        kind="growth",
        rounds=2,
        goals=(GoalSpec("most seconds per GB at any size, of the fewest", "s_per_gb_growth", 1.10),),
        quick=False,
    ),
    Scenario(
        "sizes-discarded",
        "time per GB up to 10 GB, to an S3 server that throws bodies away",
        _sized(1, 4, 10),
        kind="growth",
        store="discard",
        rounds=2,
        goals=(GoalSpec("most seconds per GB at any size, of the fewest", "s_per_gb_growth", 1.10),),
        quick=False,
        verified=False,
    ),
    Scenario(
        "counts",
        "200 MB in 150 to 100,000 tensors",
        tuple(
            states.StateSpec(f"200 MB in {3 * parameters:,} tensors", 200_000_000, parameters)
            for parameters in (50, 667, 6_667, 33_334)
        ),
        kind="growth",
        peers=("asyncckpt", "torch.save"),
        full_peers=("asyncckpt", "dcp-thread", "torch.save"),
        rounds=1,
        settles=False,
        quick=False,
    ),
)
SCENARIOS = {scenario.name: scenario for scenario in _ALL}
