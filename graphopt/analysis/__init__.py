"""Facts about graphs: functions of a `Graph`, run as ``graph.get(analysis)`` and cached there."""
