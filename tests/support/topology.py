"""What ranks do in the topology tests."""

from megabridge.parallel.topology import Coordinate

from megatron.core import parallel_state


def coordinate() -> Coordinate:
    """This rank's place, as megatron-core sees it."""
    return Coordinate(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )
