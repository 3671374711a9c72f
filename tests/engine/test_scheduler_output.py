"""Plans travel with vLLM's own scheduler output, and nothing else about it changes."""

import pickle

from pool_world import IN_WORLD, PoolWorld
from vllm.v1.core.sched.output import SchedulerOutput

from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.scheduler import RoundsSchedulerOutput, with_rounds


def world_with_a_plan() -> tuple[PoolWorld, RoundPlan]:
    """A request whose round is decided and not yet sent."""
    world = PoolWorld(IN_WORLD, 4, 100)
    world.add("r", list(range(50)))
    while world.live.get("r") is None or world.live["r"].request.num_computed_tokens < 56:
        world.step()
    world.settle()
    world.kv.allocate_slots(world.live["r"].request, 1)
    return world, world.manager.pending_plans["r", 0]


def test_a_step_without_rounds_keeps_vllms_output() -> None:
    world = PoolWorld(IN_WORLD, 4, 100)
    output = SchedulerOutput.make_empty()
    assert with_rounds(output, [world.manager]) is output


def test_plans_survive_the_way_to_a_worker_process() -> None:
    world, plan = world_with_a_plan()
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {"r": 1}
    sent = pickle.loads(pickle.dumps(with_rounds(output, [world.manager])))
    assert isinstance(sent, RoundsSchedulerOutput)
    assert sent.round_plans == (plan,)
    assert sent.num_scheduled_tokens == {"r": 1}
    assert sent.null_heads == {0: {"r": plan.num_freed_blocks}}
    assert world.manager.take_plans() == []


def test_every_step_of_a_compressed_request_says_how_long_its_null_head_is() -> None:
    world, plan = world_with_a_plan()
    world.manager.take_plans()
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {"other": 1}
    assert with_rounds(output, [world.manager]) is output
    output.num_scheduled_tokens = {"other": 1, "r": 1}
    sent = with_rounds(output, [world.manager])
    assert isinstance(sent, RoundsSchedulerOutput)
    assert sent.round_plans == ()
    assert sent.null_heads == {0: {"r": plan.num_freed_blocks}}


def test_a_destination_is_taken_off_the_list_of_blocks_to_zero() -> None:
    """vLLM zeroes after the round ran: a block freed and taken again would be wiped."""
    world, plan = world_with_a_plan()
    destination = plan.destination_blocks[0]
    output = SchedulerOutput.make_empty()
    output.new_block_ids_to_zero = [destination, 97]
    assert with_rounds(output, [world.manager]).new_block_ids_to_zero == [97]
