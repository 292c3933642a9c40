"""What ends an attempt besides its work."""


class JobCancelled(Exception):
    """Somebody cancelled the job: tidy up and let this pass."""


class LeaseLost(Exception):
    """Another worker may have the job by now: nothing that is written for it counts any more."""


class AwaitChildren(Exception):
    """The job is to be started anew when its children have ended."""
