"""The round: propose, verify, accept, commit; and the contract of those who propose."""
