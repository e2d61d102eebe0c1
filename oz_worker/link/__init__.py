"""One WebSocket and the loop that renews it; knows no dialect and no engine."""
