"""Fixtures that test files of several rooms share."""

pytest_plugins = (
    "support.servers.push_server",  # `hub`
    "support.docs.fault_runs",  # the last column of the table in docs/reliability.md
)
