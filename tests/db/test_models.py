"""What is computed of models as they are stored."""

from datetime import UTC, datetime, timedelta

from modelharbor.db.models import trending_score


def test_trending_score() -> None:
    epoch = datetime(2020, 1, 1, tzinfo=UTC)
    assert trending_score(0, 0, epoch) == 0
    assert trending_score(1000, 0, epoch) == 3
    assert trending_score(0, 100, epoch) == 3
    assert trending_score(0, 0, epoch + timedelta(days=45)) == 1
    assert trending_score(90, 1, epoch - timedelta(days=45)) == 1
