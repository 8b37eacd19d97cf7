"""What a run tells while it trains: Prometheus, dashboards, trackers, the terminal."""
