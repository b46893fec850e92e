"""The same networks and pipelines in other libraries; run by the interpreter of `--peers`, without this package's."""
