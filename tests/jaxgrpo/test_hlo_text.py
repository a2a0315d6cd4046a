"""Lines of XLA's text, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxgrpo.hlo_text import HloError, Instruction, Module, Shape, replica_groups, shape_bytes

ALIASES = "{ {0}: (2, {}, may-alias), {1}: (0, {1}, must-alias) }"
MODULE = (
    f"HloModule jit_f, input_output_alias={ALIASES}, num_partitions=8"
    """

%inner (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0), metadata={op_name="x[\\'a\\']" stack_frame_id=0}
  ROOT %f = f32[2]{0} fusion(%a), kind=kLoop, calls=%inner, metadata={op_name="calls=%other"}
}
"""
)


def group(text: str, devices: int = 8) -> list[list[int]]:
    line = f"%c = f32[2]{{0}} all-gather(%x), channel_id=1, {text}, dimensions={{0}}"
    return replica_groups(Instruction(line), devices).tolist()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'b'}",
            [[0, 1], [4, 5], [2, 3], [6, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_way_of_writing_groups_of_devices(text: str, groups: list[list[int]]) -> None:
    assert group(text) == groups


@pytest.mark.parametrize(
    "text",
    ["replica_groups=mesh['a'=8] {'a':(1)2}", "replica_groups={{0,1},{2}}", "replica_groups=?"],
)
def test_groups_that_are_not_understood_are_an_error(text: str) -> None:
    with pytest.raises(HloError, match="not understood"):
        group(text)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)(2,1)S(1)}", 24),
        ("bf16[]", 2),
        ("pred[5]{0}", 5),
        ("s4[3]{0}", 2),
        ("f8e4m3fn[7]{0}", 7),
        ("(f32[2]{0}, (u32[]{:S(2)}, bf16[4]{0}))", 20),
    ],
)
def test_bytes_of_a_shape(shape: str, size: int) -> None:
    assert shape_bytes(Instruction(f"%x = {shape} parameter(0)").shape) == size


def test_an_element_type_that_is_not_known_is_an_error() -> None:
    with pytest.raises(HloError, match="element type mystery"):
        shape_bytes(Shape("mystery", (2,)))


def test_an_instruction_is_taken_apart() -> None:
    line = (
        'ROOT %d.1 = (f32[2]{0}, s32[]) custom-call(%a, f32[2]{0} %b.2), custom_call_target="T(", '
        'called_computations={%f, %g}, metadata={op_name="jit(f)/dot" stack_frame_id=1}'
    )
    i = Instruction(line)
    assert (i.name, i.is_root, i.opcode, i.operands) == ("d.1", True, "custom-call", ("a", "b.2"))
    assert (i.target, i.op_name, i.computations()) == ("T(", "jit(f)/dot", ["f", "g"])
    assert i.shape == (Shape("f32", (2,)), Shape("s32", ()))


def test_a_module_knows_its_entry_devices_and_donations() -> None:
    module = Module.parse(MODULE)
    assert (module.entry.name, module.devices) == ("main", 8)
    assert module.aliased == [(2, ()), (0, (1,))]
    assert module.entry.root.computations() == ["inner"]
    assert module["inner"].root.number == 0
    assert np.prod(module.entry["a"].shape.dims) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the text of a compiled program"),
        ("HloModule x", "no entry computation"),
        ("HloModule x, replica_count=2\n" + MODULE, "several replicas"),
    ],
)
def test_what_is_no_program_is_refused(text: str, message: str) -> None:
    with pytest.raises(HloError, match=message):
        Module.parse(text)


def test_what_a_kernel_says_of_itself_over_several_lines_is_passed_over() -> None:
    notes = 'frontend_attributes={kernel_metadata={\n"blocks":"{\\"q\\": 512}"\n}}'
    kernel = f'custom-call(%a), custom_call_target="tpu_custom_call", {notes}'
    text = MODULE.replace("fusion(%a), kind=kLoop, calls=%inner", kernel)
    module = Module.parse(text.replace("calls=%other", "k"))
    assert [i.name for i in module.entry] == ["a", "f"]
    assert (module.entry.root.target, module.entry.root.op_name) == ("tpu_custom_call", "k")
