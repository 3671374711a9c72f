"""What a request holds, counted round by round: the plan counts with a bound instead."""

from triattention_vllm.method.policy import Policy, ceil_to_block


def held_blocks(policy: Policy, num_prompt_tokens: int, num_tokens: int) -> int:
    """Blocks that a decoding request holds in a full-attention group once its ``num_tokens``-th
    token has its place: those of all tokens, less what rounds at shorter lengths have freed."""
    num_evicted = 0
    interval = policy.request_budget(num_prompt_tokens) + policy.interval
    while num_evicted + interval < num_tokens:
        due = policy.due_round(num_evicted + interval, num_evicted, num_prompt_tokens)
        assert due is not None, "budget and interval are full"
        num_evicted = due.num_evicted_after
    return (ceil_to_block(num_tokens, policy.block_size) - num_evicted) // policy.block_size
