import copy

import pytest

from potstill.models import ending_ids


@pytest.mark.parametrize(("stated", "ends"), [([7, 8], {5, 7, 8}), (7, {5, 7}), (None, {5})])
def test_a_response_ends_where_a_turn_a_text_or_the_model_itself_says_so(
    tiny_llama, tiny_tokenizer, stated, ends
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_llama.generation_config.eos_token_id = stated
    assert ending_ids(tiny_llama, tokenizer, [5]) == {*ends, tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert ending_ids(tiny_llama, tokenizer, [5]) == ends
