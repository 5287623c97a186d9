"""What processes agree on before they do something together, and who waits for whom.

Every collective here is one that all processes reach, also after a failure in one of them.
"""

from lightning_bn.functional.distributed.agreement import DisagreementError

__all__ = ["DisagreementError"]
