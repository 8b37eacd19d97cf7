import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.charts.figure import smooth


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 60), window=st.integers(1, 70), slope=st.floats(-10, 10), gap=st.integers(0, 59))
def test_smoothing_keeps_a_straight_line_and_its_gaps(count: int, window: int, slope: float, gap: int) -> None:
    line = 3.0 + slope * np.arange(count)
    line[gap : gap + 1] = np.nan
    np.testing.assert_allclose(smooth(line, window), line, atol=1e-8)


def test_smoothing_takes_away_noise_up_to_the_last_value() -> None:
    noise = np.random.default_rng(0).standard_normal(300)
    assert np.abs(smooth(noise, 20)).max() < 0.5 * np.abs(noise).max()
    jump = np.zeros(100)
    jump[-1] = 1.0
    assert smooth(jump, 10)[-1] < 0.25
