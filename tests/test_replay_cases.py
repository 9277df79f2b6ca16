"""Where each of the 27 cases of ../shared/anchors/routing_replay.md is tested, or why it cannot arise."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# What a case is about: where it is tested, as file::test, or a sentence.
CASES: dict[int, dict[str, list[str]]] = {
    1: {"the same id twice": ["ids::test_the_same_id_twice", "rl::test_a_duplicate_ends_every_rank"]},
    2: {"complement draw": ["ids::test_every_row_is_total_and_takes_the_best_free"]},
    3: {"ties at -inf": ["ids::test_the_row_of_the_tie_at_minus_infinity"]},
    4: {"no T x K x E tensor": ["ids::test_is_that_of_the_scores", "ids::test_one_hot_is_noticed"]},
    5: {
        "fill is frozen": ["ids::test_recomputation_keeps_what_was_filled", "regions::test_a_fill_is_frozen"]
    },
    6: {"fill is balanced": ["ids::test_loads_differ_by_one_at_most"]},
    7: {
        "padding is no load": ["regions::test_does_not_reach_counts_and_bias", "rl::test_padding_is_no_load"]
    },
    8: {"weight of a filled pick": ["ids::test_values_and_gradients", "ids::test_weight_of_a_filled_pick"]},
    9: {"full AC": ["regions::test_a_moved_gate_gives_the_gradients_of_the_unmoved_ids"]},
    10: {
        "selective AC": ["regions::test_checkpoints_change_no_gradient", "regions::test_the_choice_takes_no_"]
    },
    11: {"order of backwards": ["regions::test_of_backwards_does_not_matter"]},
    12: {"forward during recomputation": ["regions::test_a_forward_in_the_middle_of_a_recomputation"]},
    13: {"a layer called twice": ["regions::test_a_shared_layer", "regions::test_by_layer_and_call"]},
    14: {"accumulation, lengths": ["regions::test_each_microbatch_has_its_own_ids"]},
    15: {"eval, exceptions": ["regions::test_eval_between_forward_and_backward"]},
    16: {"SP": ["regions::test_each_token_has_its_own", "regions::test_a_flat_offset_per_rank_would_be"]},
    17: {"CP": ["config rules refuse CP; the RL face takes ids that were sharded as the tokens were"]},
    18: {"T and T - 1 rows": ["ids::test_numbers_of_rows", "rl::test_the_last_row_may_be_missing"]},
    19: {
        "binding": [
            "regions::test_every_router_of_a_parallelized_model",
            "regions::test_orphans_have_no_part",
        ]
    },
    20: {"dtypes": ["ids::test_width_by_the_number_of_experts", "ids::test_dtypes"]},
    21: {"ids out of range, zeros": ["ids::test_ids_out_of_range", "ids::test_a_layer_of_zeros"]},
    22: {"column order": ["ids::test_follow_the_columns"]},
    23: {"weights outside the groups": ["ids::test_are_the_unbiased_unmasked_ones"]},
    24: {
        "fast paths": ["regions::test_a_compiled_model_has_no_slots", "training::test_a_router_that_lost_its"]
    },
    25: {"host syncs": ["rl::test_replay", "rl::test_record"]},
    26: {"storage": ["rl::test_record", "ids::test_a_copy"]},
    27: {
        "a check that never ran": ["training::test_a_run_without_a_step", "rl::test_a_step_without_a_forward"]
    },
}


def _tests(name: str) -> list[str]:
    tree = ast.parse((TESTS / f"test_replay_{name}.py").read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("number", range(1, 28))
def test_every_case_has_its_test_or_its_reason(number: int) -> None:
    (where,) = CASES[number].values()
    for place in where:
        if "::" not in place:
            continue
        file, test = place.split("::")
        assert [name for name in _tests(file) if name.startswith(test)], place
