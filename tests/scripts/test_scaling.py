import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from scripts.scaling import HARDWARE, main, predict, read_program

# Two all-reduces in a loop of three, and the other ways to write a group.
PROGRAM = """\
HloModule example

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %r)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %g = bf16[16]{0} all-gather(%b), replica_groups={{0,1},{2,3}}, dimensions={0}
  %m = f32[4]{0} all-reduce(%c), replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}
  %w = (s32[], f32[4,8]{1,0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %o = f32[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_are_read_with_their_groups_and_loops() -> None:
    rows = {(r["kind"], r["group"], r["bytes"], r["times"]) for r in read(PROGRAM)}
    assert rows == {("all-gather", 2, 32, 1), ("all-reduce", 4, 16, 1), ("all-reduce", 4, 128, 3)}


def read(text: str) -> list[dict]:
    return read_program(text, context=0, head_width=0)["collectives"]


def test_a_group_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot read its replica groups"):
        read(PROGRAM.replace("replica_groups={{0,1},{2,3}}", "replica_groups=?"))


def test_arithmetic_in_loops_counts_as_often_as_it_runs() -> None:
    def powers(a: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda b, _: (jnp.tanh(b @ a), None), a, None, length=5)[0]

    text = jax.jit(powers).lower(jax.ShapeDtypeStruct((32, 32), jnp.float32)).compile().as_text()
    assert read_program(text, context=0, head_width=0)["flops"] == 5 * 2 * 32**3


def test_scores_are_told_from_keys_by_the_width_of_a_head() -> None:
    text = """
ENTRY %main (keys: f32[1,1,2,8,16]) -> f32[1,1,2,4,16] {
  %keys = f32[1,1,2,8,16]{4,3,2,1,0} parameter(0)
  ROOT %scores = f32[1,1,2,4,16]{4,3,2,1,0} custom-call(%keys), custom_call_target="attend"
}
"""
    found = read_program(text, context=16, head_width=8)
    assert (found["score_bytes"], found["bytes"]) == (4 * 2 * 4 * 16, 4 * 2 * 8 * 16)


def test_a_prediction_adds_collectives_to_the_slower_of_arithmetic_and_memory() -> None:
    program = {
        "mesh": "16",
        "flops": 1e12,
        "activation_bytes": 1e10,
        "bytes": 1e11,
        "score_bytes": 1e10,
        "collectives": [{"kind": "all-reduce", "group": 16, "bytes": 1e9, "times": 2}],
    }
    gpu, tpu = (predict(program, hardware) for hardware in HARDWARE)
    slower = max(gpu["compute"], gpu["memory_low"])
    assert gpu["step_low"] == pytest.approx(slower + gpu["collectives"])
    assert gpu["step_high"] > gpu["step_low"]
    assert gpu["memory_low"] == pytest.approx(1e3 * 1e10 / 3.35e12)
    assert tpu["memory_low"] == pytest.approx(1e3 * 2e10 / 0.819e12)  # with the scores
    # Sixteen GPUs are two machines, so a ring goes through the slower network.
    assert gpu["collectives"] == pytest.approx(1e3 * 2 * (20e-6 + 2 * 15 / 16 * 1e9 / 50e9))


def test_a_table_is_made_from_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = {
        "mesh": "4x2",
        "tasks": 4,
        "flops": 1e12,
        "activation_bytes": 1e10,
        "bytes": 1e11,
        "score_bytes": 1e10,
        "collectives": [],
    }
    path = tmp_path / "programs.json"
    path.write_text(json.dumps([program]))
    assert main(["--programs", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(HARDWARE)
    assert lines[2].startswith("| 8 H100 SXM | 4x2 | 4 |")
