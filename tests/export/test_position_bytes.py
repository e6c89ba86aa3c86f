import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishertune_d2.export.position_bytes import decode_positions, encode_positions


def by_hand(positions: list[int]) -> list[int]:
    """The code, one position at a time."""
    code, following = [], 0
    for position in positions:
        escapes, rest = divmod(position - following, 255)
        code += [255] * escapes + [rest]
        following = position + 1
    return code


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 3000) | st.integers(0, 10)).map(sorted))
def test_positions_come_back_and_take_about_a_byte(positions):
    tensor = torch.tensor(positions, dtype=torch.int64)
    code = encode_positions(tensor)
    assert code.tolist() == by_hand(positions)
    assert torch.equal(decode_positions(code), tensor)
    assert len(code) <= len(positions) + 3001 / 255


@pytest.mark.parametrize("position", [0, 254, 255, 256, 509, 510, 2**31])
def test_gaps_around_the_largest_byte(position):
    tensor = torch.tensor([position, position + 1, position + 256])
    assert torch.equal(decode_positions(encode_positions(tensor)), tensor)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(250, 255) | st.integers(0, 255), max_size=60))
def test_any_bytes_give_ascending_positions_or_are_refused(content):
    code = torch.tensor(content, dtype=torch.uint8)
    if content and content[-1] == 255:
        with pytest.raises(ValueError, match="the last gap does not end"):
            decode_positions(code)
        return
    positions = decode_positions(code)
    assert len(positions) == sum(byte != 255 for byte in content)
    assert torch.equal(encode_positions(positions), code)  # so they ascend


@pytest.mark.parametrize("positions", [[-1], [3, 3], [4, 2]])
def test_refuses_positions_that_do_not_ascend(positions):
    with pytest.raises(ValueError, match="at least 0 and strictly ascending"):
        encode_positions(torch.tensor(positions))
