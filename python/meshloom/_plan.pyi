# Made from the extension module by tests/style/stubs.py; a test compares.
"""
Planning, verification and simulation; never loads LibTorch.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['BalanceStrategy', 'Cluster', 'Coordinates', 'CostFit', 'CostModel', 'CostRefiner', 'Instruction', 'Layout', 'Link', 'MemoryChange', 'MemoryForecast', 'MemoryModel', 'MemorySetting', 'ModelSizes', 'PlacedUnit', 'PlanProblem', 'Prediction', 'Program', 'RankPlan', 'RankUnit', 'Rendezvous', 'SampleInfo', 'Schedule', 'SimulatedSpan', 'Simulation', 'Slot', 'StageAction', 'StepLimits', 'StepPlan', 'StrategyRegistry', 'Unit', 'UnitTiming', 'Violation', 'Workload', 'check_memory', 'check_plan', 'check_programs', 'check_schedule', 'chunk_range', 'compile', 'compile_rank', 'fit_cost', 'forecast_memory', 'into_slots', 'lower_bound', 'make_plan', 'make_schedule', 'member_ranges', 'memory_changes', 'parse_exchange', 'parse_lockstep', 'register_strategy', 'schedule_names', 'simulate', 'step_time', 'strategies', 'strategy_names', 'verify']
class Coordinates:
    """
    Where a world rank sits.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Coordinates) -> bool:
        ...
    def __init__(self, tp: typing.SupportsInt = 0, hdp: typing.SupportsInt = 0, pp: typing.SupportsInt = 0) -> None:
        ...
    @property
    def hdp(self) -> int:
        ...
    @hdp.setter
    def hdp(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def pp(self) -> int:
        ...
    @pp.setter
    def pp(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def tp(self) -> int:
        ...
    @tp.setter
    def tp(self, arg0: typing.SupportsInt) -> None:
        ...
class Layout:
    """
    Sizes of the static mesh: world = pp x hdp x tp, tp fastest.
    """
    __hash__: typing.ClassVar[None] = None
    @staticmethod
    def parse(text: str) -> Layout:
        """
        Reads "hdp=4,tp=2".
        """
    def __eq__(self, arg0: Layout) -> bool:
        ...
    def __init__(self, *, tp: typing.SupportsInt = 1, hdp: typing.SupportsInt = 1, pp: typing.SupportsInt = 1, ep: typing.SupportsInt = 1, chunks: typing.SupportsInt = 1) -> None:
        ...
    def __repr__(self) -> str:
        ...
    def __str__(self) -> str:
        ...
    def coordinates(self, rank: typing.SupportsInt) -> Coordinates:
        ...
    def rank(self, at: Coordinates) -> int:
        ...
    def validate(self) -> None:
        ...
    @property
    def chunks(self) -> int:
        ...
    @chunks.setter
    def chunks(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def ep(self) -> int:
        ...
    @ep.setter
    def ep(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def hdp(self) -> int:
        ...
    @hdp.setter
    def hdp(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def pp(self) -> int:
        ...
    @pp.setter
    def pp(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def tp(self) -> int:
        ...
    @tp.setter
    def tp(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def world_size(self) -> int:
        ...
class CostModel:
    """
    Work of a sample: quadratic * s^2 + linear * s; a unit on D ranks takes work / D + fixed + exchange * (D - 1) / D * tokens.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: CostModel) -> bool:
        ...
    def __init__(self, *, quadratic: typing.SupportsFloat = 1.0, linear: typing.SupportsFloat = 24576.0, fixed: typing.SupportsFloat = 0.0, exchange: typing.SupportsFloat = 0.0) -> None:
        ...
    def unit_time(self, unit_work: typing.SupportsFloat, unit_tokens: typing.SupportsInt, degree: typing.SupportsInt) -> float:
        ...
    def validate(self) -> None:
        ...
    def work(self, tokens: typing.SupportsInt) -> float:
        ...
    @property
    def exchange(self) -> float:
        ...
    @exchange.setter
    def exchange(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def fixed(self) -> float:
        ...
    @fixed.setter
    def fixed(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def linear(self) -> float:
        ...
    @linear.setter
    def linear(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def quadratic(self) -> float:
        ...
    @quadratic.setter
    def quadratic(self, arg0: typing.SupportsFloat) -> None:
        ...
class MemoryModel:
    """
    What the offload rule needs; layers 0: no offload.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: MemoryModel) -> bool:
        ...
    def __init__(self, *, layers: typing.SupportsInt = 0, resident_layers: typing.SupportsInt = 2, transfer: typing.SupportsFloat = 0.0) -> None:
        ...
    def degree_needed(self, capacity_tokens: typing.SupportsInt, offload: typing.SupportsFloat, tokens: typing.SupportsInt, most: typing.SupportsInt) -> int | None:
        ...
    def most_hidden(self, cost: CostModel, tokens: typing.SupportsInt) -> float:
        ...
    def offload_needed(self, capacity_tokens: typing.SupportsInt, degree: typing.SupportsInt, tokens: typing.SupportsInt) -> float | None:
        ...
    def resident_fraction(self, offload: typing.SupportsFloat) -> float:
        ...
    def unit_capacity(self, capacity_tokens: typing.SupportsInt, degree: typing.SupportsInt, offload: typing.SupportsFloat) -> int:
        ...
    def validate(self) -> None:
        ...
    @property
    def layers(self) -> int:
        ...
    @layers.setter
    def layers(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def resident_layers(self) -> int:
        ...
    @resident_layers.setter
    def resident_layers(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def transfer(self) -> float:
        ...
    @transfer.setter
    def transfer(self, arg0: typing.SupportsFloat) -> None:
        ...
class UnitTiming:
    """
    One unit as it was measured on one of its ranks.
    """
    def __init__(self, tokens: collections.abc.Sequence[typing.SupportsFloat], seconds: typing.SupportsFloat, degree: typing.SupportsInt = 1) -> None:
        """
        `tokens` of each sample; `seconds` of forward and backward.
        """
    @property
    def degree(self) -> int:
        ...
    @degree.setter
    def degree(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def seconds(self) -> float:
        ...
    @seconds.setter
    def seconds(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def square_sum(self) -> float:
        ...
    @square_sum.setter
    def square_sum(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def token_sum(self) -> float:
        ...
    @token_sum.setter
    def token_sum(self, arg0: typing.SupportsFloat) -> None:
        ...
class CostFit:
    """
    A cost model and how well it explains the timings.
    """
    @property
    def median_error(self) -> float:
        ...
    @property
    def model(self) -> CostModel:
        ...
    @property
    def outliers(self) -> int:
        ...
    @property
    def worst_error(self) -> float:
        ...
class CostRefiner:
    """
    Follows measured unit times while training.
    """
    __hash__: typing.ClassVar[None] = None
    @staticmethod
    def from_json(text: str) -> CostRefiner:
        ...
    def __eq__(self, arg0: CostRefiner) -> bool:
        ...
    def __init__(self, prior: CostModel, horizon: typing.SupportsFloat = 512.0) -> None:
        ...
    def add(self, timing: UnitTiming) -> None:
        ...
    def to_json(self) -> str:
        ...
    @property
    def error(self) -> float:
        ...
    @property
    def model(self) -> CostModel:
        ...
    @property
    def units(self) -> int:
        ...
class SampleInfo:
    """
    Metadata of one training document.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: SampleInfo) -> bool:
        ...
    def __init__(self, id: typing.SupportsInt, tokens: typing.SupportsInt, loss_tokens: typing.SupportsInt | None = None) -> None:
        ...
    def __repr__(self) -> str:
        ...
    @property
    def id(self) -> int:
        ...
    @id.setter
    def id(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def loss_tokens(self) -> int:
        ...
    @loss_tokens.setter
    def loss_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def tokens(self) -> int:
        ...
    @tokens.setter
    def tokens(self, arg0: typing.SupportsInt) -> None:
        ...
class Unit:
    """
    HDP ranks, in ring order, and the samples they process together.
    """
    __hash__: typing.ClassVar[None] = None
    exchange: str
    def __eq__(self, arg0: Unit) -> bool:
        ...
    def __init__(self, ranks: collections.abc.Sequence[typing.SupportsInt], samples: collections.abc.Sequence[typing.SupportsInt], *, exchange: str | None = None, ulysses_degree: typing.SupportsInt = 0, offload: typing.SupportsFloat = 0.0) -> None:
        """
        `exchange` is local for one rank and ring for several unless given.
        """
    def __repr__(self) -> str:
        ...
    @property
    def offload(self) -> float:
        ...
    @offload.setter
    def offload(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def ranks(self) -> list[int]:
        ...
    @ranks.setter
    def ranks(self, arg0: collections.abc.Sequence[typing.SupportsInt]) -> None:
        ...
    @property
    def samples(self) -> list[int]:
        ...
    @samples.setter
    def samples(self, arg0: collections.abc.Sequence[typing.SupportsInt]) -> None:
        ...
    @property
    def ulysses_degree(self) -> int:
        ...
    @ulysses_degree.setter
    def ulysses_degree(self, arg0: typing.SupportsInt) -> None:
        ...
class PlacedUnit(Unit):
    """
    A unit and its place in the order.
    """
    @property
    def index(self) -> int:
        """
        Position in the slot.
        """
    @property
    def slot(self) -> int:
        ...
class Slot:
    """
    A position in the global order.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Slot) -> bool:
        ...
    def __init__(self, units: collections.abc.Sequence[Unit]) -> None:
        ...
    @property
    def units(self) -> list[Unit]:
        """
        A copy; assign a list to change it.
        """
    @units.setter
    def units(self, arg0: collections.abc.Sequence[Unit]) -> None:
        ...
class RankUnit(PlacedUnit):
    """
    One micro-batch of one HDP rank.
    """
    @property
    def cu_seqlens(self) -> list[int]:
        """
        Ends of the whole documents.
        """
    @property
    def local_cu_seqlens(self) -> list[int]:
        """
        Ends of this rank's share of each document.
        """
    @property
    def member(self) -> int:
        """
        This rank's position in `ranks`.
        """
    @property
    def ranges(self) -> list:
        """
        Per document, the two half-open token ranges that this rank holds.
        """
class RankPlan:
    """
    What one HDP rank runs in a step, in order.
    """
    @property
    def cu_seqlens(self) -> list:
        """
        Cumulative lengths of whole documents, a list for each micro-batch.
        """
    @property
    def local_cu_seqlens(self) -> list:
        """
        Cumulative lengths of this rank's shares.
        """
    @property
    def rank(self) -> int:
        ...
    @property
    def samples(self) -> list:
        """
        Sample ids, a list for each micro-batch.
        """
    @property
    def units(self) -> list[RankUnit]:
        ...
class Prediction:
    """
    Figures of the plan file's `predicted`.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Prediction) -> bool:
        ...
    def __init__(self) -> None:
        ...
    def __repr__(self) -> str:
        ...
    @property
    def efficiency(self) -> float:
        ...
    @efficiency.setter
    def efficiency(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def exchange_tokens(self) -> int:
        ...
    @exchange_tokens.setter
    def exchange_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def lower_bound(self) -> float:
        ...
    @lower_bound.setter
    def lower_bound(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def makespan(self) -> float:
        ...
    @makespan.setter
    def makespan(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def step_time(self) -> float | None:
        ...
    @step_time.setter
    def step_time(self, arg0: typing.SupportsFloat | None) -> None:
        ...
class StepPlan:
    """
    What happens in one optimizer step, as plain data.
    """
    __hash__: typing.ClassVar[None] = None
    cost: CostModel
    layout: Layout
    lockstep: str
    memory: MemoryModel
    predicted: Prediction
    strategy: str
    @staticmethod
    def from_json(text: str) -> StepPlan:
        ...
    @staticmethod
    def load(path: typing.Any) -> StepPlan:
        ...
    def __copy__(self) -> StepPlan:
        ...
    def __deepcopy__(self, arg0: dict) -> StepPlan:
        ...
    def __eq__(self, arg0: StepPlan) -> bool:
        ...
    def __getstate__(self) -> tuple:
        ...
    def __init__(self) -> None:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: tuple) -> None:
        ...
    def for_rank(self, rank: typing.SupportsInt) -> RankPlan:
        """
        What one HDP rank runs, as plain lists.
        """
    def hash(self) -> int:
        ...
    def predict_(self) -> None:
        """
        Fills `predicted` from the slots.
        """
    def rank_finish_times(self) -> list[float]:
        """
        When every HDP rank ends.
        """
    def sample_ranks(self) -> dict[int, list[int]]:
        """
        The HDP ranks of every sample, by id.
        """
    def save(self, path: typing.Any) -> None:
        ...
    def to_json(self) -> str:
        ...
    def total_loss_tokens(self) -> int:
        ...
    def total_tokens(self) -> int:
        ...
    def units(self) -> list[PlacedUnit]:
        """
        All units in global order, each with its `.slot`.
        """
    @property
    def capacity_tokens(self) -> int:
        ...
    @capacity_tokens.setter
    def capacity_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def ranks_per_node(self) -> int:
        """
        HDP ranks of a node, as the planner was told; 0: all in one.
        """
    @ranks_per_node.setter
    def ranks_per_node(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def samples(self) -> list[SampleInfo]:
        """
        A copy; assign a list to change it.
        """
    @samples.setter
    def samples(self, arg0: collections.abc.Sequence[SampleInfo]) -> None:
        ...
    @property
    def slots(self) -> list[Slot]:
        """
        A copy; assign a list to change it.
        """
    @slots.setter
    def slots(self, arg0: collections.abc.Sequence[Slot]) -> None:
        ...
    @property
    def step(self) -> int:
        ...
    @step.setter
    def step(self, arg0: typing.SupportsInt) -> None:
        ...
class PlanProblem:
    """
    Everything that a plan is a function of.
    """
    cost: CostModel
    layout: Layout
    lockstep: str
    memory: MemoryModel
    @staticmethod
    def from_lengths(lengths: collections.abc.Sequence[typing.SupportsInt], layout: Layout, capacity_tokens: typing.SupportsInt) -> PlanProblem:
        """
        Ids 0 .. n-1, every token but the first a target.
        """
    def __init__(self) -> None:
        ...
    def choose_exchanges(self, rules: str) -> None:
        """
        How units of some sizes exchange keys and values: NAME[:DEGREES[:TOKENS]],..., e.g. `ring:2-4,ulysses`.
        """
    def validate(self) -> None:
        ...
    @property
    def capacity_tokens(self) -> int:
        ...
    @capacity_tokens.setter
    def capacity_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def ranks_per_node(self) -> int:
        ...
    @ranks_per_node.setter
    def ranks_per_node(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def samples(self) -> list[SampleInfo]:
        """
        A copy; assign a list to change it.
        """
    @samples.setter
    def samples(self, arg0: collections.abc.Sequence[SampleInfo]) -> None:
        ...
    @property
    def step(self) -> int:
        ...
    @step.setter
    def step(self, arg0: typing.SupportsInt) -> None:
        ...
class BalanceStrategy:
    """
    Decides which ranks work together on which samples. Subclass it and define
    `assign(self, problem)` returning a list of Unit in global order, or of Slot.
    """
    def __init__(self) -> None:
        ...
    def assign(self, problem: PlanProblem) -> list[Slot]:
        ...
class StrategyRegistry:
    """
    Name -> strategy; filled explicitly.
    """
    def __init__(self) -> None:
        ...
    def add(self, name: str, factory: collections.abc.Callable) -> None:
        """
        `factory()` returns a BalanceStrategy.
        """
    def create(self, name: str) -> BalanceStrategy:
        ...
    def names(self) -> list[str]:
        ...
class StageAction:
    """
    One computation of a pipeline stage.
    """
    __hash__: typing.ClassVar[None] = None
    defer_weight_gradient: bool
    def __eq__(self, arg0: StageAction) -> bool:
        ...
    def __init__(self, op: str, slot: typing.SupportsInt, chunk: typing.SupportsInt = 0, *, defer_weight_gradient: bool = False) -> None:
        """
        `op` is forward, backward or weight_gradient.
        """
    def __repr__(self) -> str:
        ...
    @property
    def chunk(self) -> int:
        ...
    @chunk.setter
    def chunk(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def op(self) -> str:
        ...
    @property
    def slot(self) -> int:
        ...
    @slot.setter
    def slot(self, arg0: typing.SupportsInt) -> None:
        ...
class Schedule:
    """
    Each pipeline stage's total order of computations over slots.
    """
    def __init__(self, stages: collections.abc.Sequence[collections.abc.Sequence[StageAction]], placement: collections.abc.Sequence[tuple[typing.SupportsInt, typing.SupportsInt]] = []) -> None:
        """
        `stages` lists each stage's actions; `placement` the (stage, chunk) of the model's pieces in order, round the stages where it is not given.
        """
    @property
    def placement(self) -> list[tuple[int, int]]:
        ...
    @property
    def stages(self) -> list[list[StageAction]]:
        """
        A copy; assign a list to change it.
        """
    @stages.setter
    def stages(self, arg0: collections.abc.Sequence[collections.abc.Sequence[StageAction]]) -> None:
        ...
class Rendezvous:
    """
    What meets inside an instruction.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Rendezvous) -> bool:
        ...
    @property
    def count(self) -> int:
        ...
    @count.setter
    def count(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def kind(self) -> str:
        ...
    @property
    def ranks(self) -> list[int]:
        ...
    @ranks.setter
    def ranks(self, arg1: collections.abc.Sequence[typing.SupportsInt]) -> None:
        ...
class Instruction:
    """
    A micro-batch on a pipeline stage.
    """
    __hash__: typing.ClassVar[None] = None
    defer_weight_gradient: bool
    gradient: bool
    def __eq__(self, arg0: Instruction) -> bool:
        ...
    @property
    def chunk(self) -> int:
        ...
    @chunk.setter
    def chunk(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def op(self) -> str:
        ...
    @property
    def peer(self) -> int:
        ...
    @peer.setter
    def peer(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def rendezvous(self) -> list[Rendezvous]:
        """
        A copy; assign a list to change it.
        """
    @rendezvous.setter
    def rendezvous(self, arg0: collections.abc.Sequence[Rendezvous]) -> None:
        ...
    @property
    def slot(self) -> int:
        ...
    @slot.setter
    def slot(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def unit(self) -> int:
        ...
    @unit.setter
    def unit(self, arg0: typing.SupportsInt) -> None:
        ...
class Program:
    """
    How one rank carries out one step.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Program) -> bool:
        ...
    @property
    def instructions(self) -> list[Instruction]:
        """
        A copy; assign a list to change it.
        """
    @instructions.setter
    def instructions(self, arg0: collections.abc.Sequence[Instruction]) -> None:
        ...
    @property
    def rank(self) -> int:
        ...
    @rank.setter
    def rank(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def step(self) -> int:
        ...
    @step.setter
    def step(self, arg0: typing.SupportsInt) -> None:
        ...
class Violation:
    """
    One broken contract.
    """
    def __repr__(self) -> str:
        ...
    def __str__(self) -> str:
        ...
    @property
    def contract(self) -> str:
        ...
    @property
    def message(self) -> str:
        ...
class ModelSizes:
    """
    Sizes of a decoder model, as far as memory depends on them.
    """
    __hash__: typing.ClassVar[None] = None
    correction_bias: bool
    mlp_bias: bool
    output_bias: bool
    qk_norm: bool
    qkv_bias: bool
    tied_embeddings: bool
    def __eq__(self, arg0: ModelSizes) -> bool:
        ...
    def __init__(self) -> None:
        ...
    @property
    def expert_intermediate(self) -> int:
        ...
    @expert_intermediate.setter
    def expert_intermediate(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def experts(self) -> int:
        ...
    @experts.setter
    def experts(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def experts_per_token(self) -> int:
        ...
    @experts_per_token.setter
    def experts_per_token(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def head_dim(self) -> int:
        """
        Of queries and keys.
        """
    @head_dim.setter
    def head_dim(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def heads(self) -> int:
        ...
    @heads.setter
    def heads(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def hidden(self) -> int:
        ...
    @hidden.setter
    def hidden(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def intermediate(self) -> int:
        ...
    @intermediate.setter
    def intermediate(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def key_value_heads(self) -> int:
        ...
    @key_value_heads.setter
    def key_value_heads(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def kv_lora_rank(self) -> int:
        ...
    @kv_lora_rank.setter
    def kv_lora_rank(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def moe_layers(self) -> list[bool]:
        """
        A copy; assign a list to change it.
        """
    @moe_layers.setter
    def moe_layers(self, arg0: collections.abc.Sequence[bool]) -> None:
        ...
    @property
    def parameter_count(self) -> int:
        ...
    @property
    def q_lora_rank(self) -> int:
        ...
    @q_lora_rank.setter
    def q_lora_rank(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def rope_dim(self) -> int:
        """
        0: head_dim.
        """
    @rope_dim.setter
    def rope_dim(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def shared_intermediate(self) -> int:
        ...
    @shared_intermediate.setter
    def shared_intermediate(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def value_dim(self) -> int:
        """
        0: head_dim.
        """
    @value_dim.setter
    def value_dim(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def vocabulary(self) -> int:
        ...
    @vocabulary.setter
    def vocabulary(self, arg0: typing.SupportsInt) -> None:
        ...
class MemorySetting:
    """
    Everything a rank's memory depends on, beside the step it runs.
    """
    layout: Layout
    model: ModelSizes
    recompute: str
    schedule: str
    def __init__(self) -> None:
        ...
    @property
    def element_bytes(self) -> int:
        ...
    @element_bytes.setter
    def element_bytes(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def split(self) -> list[int]:
        """
        A copy; assign a list to change it.
        """
    @split.setter
    def split(self, arg0: collections.abc.Sequence[typing.SupportsInt]) -> None:
        ...
    @property
    def zero(self) -> int:
        ...
    @zero.setter
    def zero(self, arg0: typing.SupportsInt) -> None:
        ...
class StepLimits:
    """
    What bounds the steps of a run, in tokens.
    """
    def __init__(self, *, capacity: typing.SupportsInt, global_batch: typing.SupportsInt, longest_document: typing.SupportsInt = 1) -> None:
        ...
    @property
    def capacity(self) -> int:
        ...
    @capacity.setter
    def capacity(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def global_batch(self) -> int:
        ...
    @global_batch.setter
    def global_batch(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def longest_document(self) -> int:
        ...
    @longest_document.setter
    def longest_document(self, arg0: typing.SupportsInt) -> None:
        ...
class MemoryForecast:
    """
    What a rank holds when it holds most, in bytes of tensors.
    """
    @property
    def parts(self) -> dict[str, int]:
        ...
    @property
    def rank(self) -> int:
        ...
    @property
    def states(self) -> int:
        """
        Parameters, gradients, masters and moments.
        """
    @property
    def total(self) -> int:
        ...
class MemoryChange:
    """
    One way to hold less.
    """
    @property
    def bytes(self) -> int:
        """
        Of the fullest rank then.
        """
    @property
    def setting(self) -> str:
        ...
class Link:
    """
    b bytes take latency + b / bandwidth (seconds, bytes/second).
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Link) -> bool:
        ...
    def __init__(self, bandwidth: typing.SupportsFloat, latency: typing.SupportsFloat = 0.0) -> None:
        ...
    @property
    def bandwidth(self) -> float:
        ...
    @bandwidth.setter
    def bandwidth(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def latency(self) -> float:
        ...
    @latency.setter
    def latency(self, arg0: typing.SupportsFloat) -> None:
        ...
class Cluster:
    """
    The machines; world ranks fill nodes in order.
    """
    @staticmethod
    def from_yaml(text: str, name: str = 'cluster', base: Cluster = ...) -> Cluster:
        ...
    @staticmethod
    def load(path: str) -> Cluster:
        ...
    def __init__(self) -> None:
        ...
    @property
    def between(self) -> Link:
        """
        Between nodes, per rank.
        """
    @between.setter
    def between(self, arg0: Link) -> None:
        ...
    @property
    def compute_rate(self) -> float:
        ...
    @compute_rate.setter
    def compute_rate(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def host(self) -> Link:
        """
        Device to host memory, per rank.
        """
    @host.setter
    def host(self, arg0: Link) -> None:
        ...
    @property
    def inside(self) -> Link:
        """
        Between ranks of one node.
        """
    @inside.setter
    def inside(self, arg0: Link) -> None:
        ...
    @property
    def loader_seconds(self) -> float:
        ...
    @loader_seconds.setter
    def loader_seconds(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def node_bandwidth(self) -> float:
        """
        Of all ranks of a node together to other nodes; 0: no limit but theirs.
        """
    @node_bandwidth.setter
    def node_bandwidth(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def nodes(self) -> int:
        """
        0: as many as the ranks need.
        """
    @nodes.setter
    def nodes(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def overlap(self) -> float:
        """
        Part of transfers that computation hides where there is some.
        """
    @overlap.setter
    def overlap(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def ranks_per_node(self) -> int:
        ...
    @ranks_per_node.setter
    def ranks_per_node(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def slow_ranks(self) -> dict[int, float]:
        """
        A copy; assign a dict to change it.
        """
    @slow_ranks.setter
    def slow_ranks(self, arg0: collections.abc.Mapping[typing.SupportsInt, typing.SupportsFloat]) -> None:
        ...
class Workload:
    """
    The model as the simulator sees it.
    """
    @staticmethod
    def from_yaml(text: str, name: str = 'cluster', base: Workload = ...) -> Workload:
        ...
    @staticmethod
    def llama_7b() -> Workload:
        """
        ByteScale's figure 6.
        """
    @staticmethod
    def llama_7b_cost() -> CostModel:
        """
        The cost model in whose units llama_7b counts seconds.
        """
    def __init__(self) -> None:
        ...
    @property
    def dispatch_bytes(self) -> float:
        ...
    @dispatch_bytes.setter
    def dispatch_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def element_bytes(self) -> int:
        ...
    @element_bytes.setter
    def element_bytes(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def expert_gradient_bytes(self) -> float:
        ...
    @expert_gradient_bytes.setter
    def expert_gradient_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def expert_parameter_bytes(self) -> float:
        ...
    @expert_parameter_bytes.setter
    def expert_parameter_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def expert_share(self) -> float:
        """
        Part of the linear work that goes where tokens are dispatched to.
        """
    @expert_share.setter
    def expert_share(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def forward_share(self) -> float:
        ...
    @forward_share.setter
    def forward_share(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def gradient_bytes(self) -> float:
        ...
    @gradient_bytes.setter
    def gradient_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def head_dim(self) -> int:
        ...
    @head_dim.setter
    def head_dim(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def heads(self) -> int:
        ...
    @heads.setter
    def heads(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def hidden_bytes(self) -> float:
        ...
    @hidden_bytes.setter
    def hidden_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def key_value_heads(self) -> int:
        ...
    @key_value_heads.setter
    def key_value_heads(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def layers(self) -> int:
        ...
    @layers.setter
    def layers(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def mixture_share(self) -> float:
        """
        Of the layers.
        """
    @mixture_share.setter
    def mixture_share(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def parameter_bytes(self) -> float:
        ...
    @parameter_bytes.setter
    def parameter_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def recompute(self) -> str:
        """
        Traffic of forward that backward repeats; what it computes is the cost's.
        """
    @recompute.setter
    def recompute(self, arg0: str) -> None:
        ...
    @property
    def saved_bytes(self) -> float:
        ...
    @saved_bytes.setter
    def saved_bytes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def seconds_per_work(self) -> float:
        ...
    @seconds_per_work.setter
    def seconds_per_work(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def stage_shares(self) -> list[float]:
        """
        Of the computation; empty: even. A copy; assign a list to change it.
        """
    @stage_shares.setter
    def stage_shares(self, arg0: collections.abc.Sequence[typing.SupportsFloat]) -> None:
        ...
    @property
    def statistic_bytes(self) -> int:
        ...
    @statistic_bytes.setter
    def statistic_bytes(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def step_seconds(self) -> float:
        ...
    @step_seconds.setter
    def step_seconds(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def weight_gradient_share(self) -> float:
        ...
    @weight_gradient_share.setter
    def weight_gradient_share(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def window(self) -> int:
        ...
    @window.setter
    def window(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def wire_bytes(self) -> int:
        ...
    @wire_bytes.setter
    def wire_bytes(self, arg1: typing.SupportsInt) -> None:
        ...
    @property
    def zero(self) -> int:
        """
        Of plans in lockstep over the HDP axis.
        """
    @zero.setter
    def zero(self, arg0: typing.SupportsInt) -> None:
        ...
class SimulatedSpan:
    """
    One instruction of one rank, in seconds.
    """
    @property
    def begin(self) -> float:
        ...
    @property
    def chunk(self) -> int:
        ...
    @property
    def compute(self) -> float:
        ...
    @property
    def end(self) -> float:
        ...
    @property
    def exposed(self) -> float:
        ...
    @property
    def op(self) -> str:
        ...
    @property
    def rank(self) -> int:
        ...
    @property
    def slot(self) -> int:
        ...
    @property
    def unit(self) -> int:
        ...
class Simulation:
    """
    Times in seconds, bytes as sent.
    """
    @property
    def bubble(self) -> float:
        """
        Mean time without computation, as a part of the step.
        """
    @property
    def busy(self) -> list[float]:
        """
        Computation of every world rank.
        """
    @property
    def bytes_between(self) -> float:
        ...
    @property
    def bytes_host(self) -> float:
        ...
    @property
    def bytes_inside(self) -> float:
        ...
    @property
    def exposed(self) -> list[float]:
        """
        Unhidden communication of every world rank.
        """
    @property
    def finish(self) -> list[float]:
        """
        Of every world rank.
        """
    @property
    def peak_memory(self) -> list[float]:
        """
        Bytes of saved activations.
        """
    @property
    def spans(self) -> list[SimulatedSpan]:
        ...
    @property
    def step_time(self) -> float:
        ...
def check_memory(plan: StepPlan, programs: collections.abc.Sequence[Program], most_tokens: typing.SupportsFloat) -> list[Violation]:
    """
    Where a rank keeps activations of more than so many tokens of all layers at a time.
    """
def check_plan(plan: StepPlan) -> list[Violation]:
    """
    All violations of the plan's contracts; empty: it is valid.
    """
def check_programs(plan: StepPlan, programs: collections.abc.Sequence[Program]) -> list[Violation]:
    """
    All violations of all ranks' programs together.
    """
def check_schedule(schedule: Schedule, layout: Layout, slots: typing.SupportsInt) -> None:
    """
    Raises PlanError for a table that can't be carried out.
    """
def chunk_range(tokens: typing.SupportsInt, degree: typing.SupportsInt, chunk: typing.SupportsInt) -> tuple[int, int]:
    """
    Chunk k of 2D of a document, as (begin, end).
    """
def compile(plan: StepPlan, *, layers: typing.SupportsInt = 1, schedule: str = '', table: Schedule = None) -> list[Program]:
    """
    Programs of all ranks, in rank order. `table` is a pipeline schedule of one's own.
    """
def compile_rank(plan: StepPlan, rank: typing.SupportsInt, *, layers: typing.SupportsInt = 1, schedule: str = '', table: Schedule = None) -> Program:
    ...
def fit_cost(timings: collections.abc.Sequence[UnitTiming]) -> CostFit:
    """
    Least squares on relative errors; coefficients not negative, outliers weighted down.
    """
@typing.overload
def forecast_memory(setting: MemorySetting, limits: StepLimits) -> list[MemoryForecast]:
    """
    Of the first rank of every pipeline stage, in the fullest step of these limits.
    """
@typing.overload
def forecast_memory(setting: MemorySetting, plan: StepPlan, program: Program) -> MemoryForecast:
    """
    Of the rank whose program it is.
    """
def into_slots(units: collections.abc.Sequence[Unit], hdp: typing.SupportsInt) -> list[Slot]:
    """
    Units in order -> slots.
    """
def lower_bound(problem: PlanProblem) -> float:
    """
    A proven lower bound on the makespan of any plan.
    """
@typing.overload
def make_plan(problem: PlanProblem, strategy: str = 'balanced') -> StepPlan:
    """
    Validates the problem, runs the strategy, predicts and verifies.
    """
@typing.overload
def make_plan(problem: PlanProblem, strategy: BalanceStrategy, name: str | None = None) -> StepPlan:
    ...
def make_schedule(name: str, layout: Layout, slots: typing.SupportsInt) -> Schedule:
    """
    A built-in schedule as a table.
    """
def member_ranges(tokens: typing.SupportsInt, degree: typing.SupportsInt, index: typing.SupportsInt) -> tuple[tuple[int, int], tuple[int, int]]:
    """
    The two token ranges that one member of a unit holds of a document.
    """
def memory_changes(setting: MemorySetting, limits: StepLimits, most_bytes: typing.SupportsInt) -> list[MemoryChange]:
    """
    Settings with which the fullest rank holds at most `most_bytes`, or least.
    """
def parse_exchange(name: str) -> typing.Any:
    """
    The name itself, if it is one; else InvalidArgument lists the known ones.
    """
def parse_lockstep(name: str) -> typing.Any:
    """
    The name itself, if it is one; else InvalidArgument lists the known ones.
    """
def register_strategy(name: str) -> collections.abc.Callable:
    """
    Class decorator: registers a BalanceStrategy under a name.
    """
def schedule_names() -> list[str]:
    """
    Built-in pipeline schedules.
    """
def simulate(plan: StepPlan, cluster: Cluster, workload: Workload, *, schedule: str = '', table: Schedule = None, spans: bool = False) -> Simulation:
    """
    Compiles the plan's programs and runs them on a cost model.
    """
def step_time(plan: StepPlan, schedule: str = '') -> float:
    """
    Time of the plan's programs in the units of its cost model.
    """
def strategy_names() -> list[str]:
    """
    Registered strategies.
    """
@typing.overload
def verify(plan: StepPlan) -> None:
    """
    Raises PlanError naming the first violation and how many more there are.
    """
@typing.overload
def verify(plan: StepPlan, programs: collections.abc.Sequence[Program]) -> None:
    ...
__version__: str = '0.1.0'
strategies: StrategyRegistry
