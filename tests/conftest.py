"""Fixtures that test files of several rooms share."""

pytest_plugins = ("support.servers.push_server",)  # `hub`
