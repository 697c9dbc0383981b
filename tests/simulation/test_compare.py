"""The tables of a comparison."""

from crossfl.protocol.comparison import Arm, Comparison
from crossfl.protocol.measurements import Metrics, TaskMetrics
from crossfl.simulation.compare import table


def test_every_score_of_every_arm_has_a_row() -> None:
    def arm(loss: float, **scores: float) -> Arm:
        tasks = {"esol": TaskMetrics(loss=loss, **scores)}
        final = {"polaris": Metrics(loss=loss, tokens=9, tasks=tasks)}
        return Arm(rounds=({"polaris": 2.0}, {"polaris": loss}), final=final)

    arms = {"federated": arm(1.0, coverage=0.0), "polaris": arm(0.5, rmse=1.25)}
    printed = table(Comparison(arms=arms))
    assert "| federated | 1.000 | 1.000 |" in printed
    assert "| polaris | esol | coverage | 0.000 | – |" in printed
    assert "| polaris | esol | rmse | – | 1.250 |" in printed
    assert "| 2 | 1.000 | 0.500 |" in printed
    assert "perplexity" not in printed
