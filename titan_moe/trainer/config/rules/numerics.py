"""Rules about ``[numerics]``."""

from pathlib import Path

from titan_moe.trainer.config.rules.facts import Broken, Facts


def inputs_come_from_a_capture(facts: Facts) -> None:
    """What is put in the place of a run's own was captured, and is looked at by a capture."""
    numerics = facts.plan.numerics
    if numerics.inputs_of is None:
        return
    key = f"numerics.inputs_of ({numerics.inputs_of})"
    if not numerics.capture:
        raise Broken(
            f"numerics.inputs_of ({numerics.inputs_of}) needs numerics.capture (False); switch it on"
        )
    if not (Path(numerics.inputs_of) / "numerics" / "manifest.json").is_file():
        raise Broken(
            f"{key} has no numerics/manifest.json; give the dump folder of a run with numerics.capture"
        )


RULES = (inputs_come_from_a_capture,)
