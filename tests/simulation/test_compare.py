"""The tables of a comparison."""

from typing import Any

from crossfl.simulation.compare import table


def test_every_score_of_every_arm_has_a_row() -> None:
    def arm(loss: float, **scores: float) -> dict[str, Any]:
        metrics = {"loss": loss, "tokens": 9, "tasks": {"esol": {"loss": loss, **scores}}}
        return {"rounds": [{"polaris": 2.0}, {"polaris": loss}], "final": {"polaris": metrics}}

    printed = table({"federated": arm(1.0, coverage=0.0), "polaris": arm(0.5, rmse=1.25)})
    assert "| federated | 1.000 | 1.000 |" in printed
    assert "| polaris | esol | coverage | 0.000 | – |" in printed
    assert "| polaris | esol | rmse | – | 1.250 |" in printed
    assert "| 2 | 1.000 | 0.500 |" in printed
    assert "perplexity" not in printed
