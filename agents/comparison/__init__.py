"""Forms of world models compared on one environment: the same experience, the same trunk, the same planner, a row for each."""
