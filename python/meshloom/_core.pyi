# Made from the extension module by tests/style/stubs.py; a test compares.
"""
Communication, models, data and training; import torch first.
"""
from __future__ import annotations
import collections.abc
import datetime
import meshloom._plan
import torch
import torch.distributed.distributed_c10d
import typing
__all__: list[str] = ['AdamWOptions', 'CheckpointSection', 'Communicator', 'DataSection', 'Document', 'DocumentRef', 'ExpertsSection', 'GradientsOptions', 'GradientsResult', 'GroupOptions', 'GroupTraffic', 'KindTraffic', 'Loader', 'MemoryReport', 'ModelConfig', 'ModelSection', 'MoeConfig', 'OffloadSection', 'ParallelSection', 'ParameterRule', 'RankTimes', 'ReduceOp', 'RopeConfig', 'ScheduleOptions', 'Source', 'StepMembership', 'StepMetrics', 'Tokenizer', 'TrafficEntry', 'TrainConfig', 'Trainer', 'UnitShare', 'Watchdog', 'Work', 'cached', 'callback_tokenizer', 'concatenate', 'documents_of_iterable', 'documents_of_sequence', 'export_checkpoint', 'gradients', 'jsonl', 'load_model_config', 'load_sentencepiece', 'make_fake_world', 'make_mpi_world', 'make_nccl_world', 'make_thread_world', 'make_world', 'open_data', 'report_on_signal', 'run_thread_ranks', 'stop_on_signals', 'text_folder', 'torch_version', 'train_sentencepiece']
class GroupOptions:
    """
    What all groups of a world share.
    """
    deterministic: bool
    name: str
    timeout: datetime.timedelta | None
    def __init__(self, name: str = 'world', timeout: datetime.timedelta | None = None, deterministic: bool = False) -> None:
        """
        The timeout (seconds or a timedelta) limits calls that give none; without it MESHLOOM_TIMEOUT_SECONDS does.
        """
class Work:
    """
    One started operation; copies share it.
    """
    def done(self) -> bool:
        """
        True once the operation ended, well or badly. Never blocks.
        """
    def result(self, limit: datetime.timedelta | None = None) -> torch.Tensor:
        """
        wait(), then the output of the operations that return one.
        """
    def wait(self, limit: datetime.timedelta | None = None) -> None:
        """
        Blocks until the operation ends; the limit is in seconds or a timedelta.
        """
class TrafficEntry:
    """
    Bytes and calls under one purpose.
    """
    @property
    def calls(self) -> int:
        ...
    @property
    def exposed_seconds(self) -> float:
        ...
    @property
    def received_bytes(self) -> int:
        ...
    @property
    def seconds(self) -> float:
        ...
    @property
    def sent_bytes(self) -> int:
        ...
    @property
    def sent_to(self) -> dict[int, int]:
        ...
class GroupTraffic:
    """
    One group's account.
    """
    @property
    def group(self) -> str:
        ...
    @property
    def ranks(self) -> list[int]:
        ...
    @property
    def traffic(self) -> dict[str, TrafficEntry]:
        ...
class ReduceOp:
    """
    Members:
    
      SUM
    
      MAX
    
      MIN
    """
    MAX: typing.ClassVar[ReduceOp]
    MIN: typing.ClassVar[ReduceOp]
    SUM: typing.ClassVar[ReduceOp]
    __members__: typing.ClassVar[dict[str, ReduceOp]]
    def __eq__(self, other: typing.Any) -> bool:
        ...
    def __getstate__(self) -> int:
        ...
    def __hash__(self) -> int:
        ...
    def __index__(self) -> int:
        ...
    def __init__(self, value: typing.SupportsInt) -> None:
        ...
    def __int__(self) -> int:
        ...
    def __ne__(self, other: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, state: typing.SupportsInt) -> None:
        ...
    def __str__(self) -> str:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def value(self) -> int:
        ...
class Communicator:
    """
    A group of ranks and its traffic. Collective calls start the operation and return a Work; all ranks make them in the same order.
    """
    @staticmethod
    def from_env(options: GroupOptions = ..., device: str = 'cpu') -> typing.Any:
        """
        The world that the launcher made: mpirun, torchrun, a Slurm step, or a world of one. With device 'cuda' it carries CUDA tensors by NCCL. MESHLOOM_BACKEND overrides.
        """
    @staticmethod
    def from_process_group(group: torch.distributed.distributed_c10d.ProcessGroup, options: GroupOptions = ...) -> Communicator:
        """
        A world over a torch.distributed group that carries CPU tensors, e.g. torch.distributed.group.WORLD. Collective.
        """
    def abort(self, reason: str) -> None:
        """
        Ends every pending and future call on this rank with CommError.
        """
    def all_gather(self, input: torch.Tensor, rows: collections.abc.Sequence[typing.SupportsInt], timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        """
        Every rank's rows, concatenated in rank order.
        """
    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM, timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        """
        Element-wise reduction, in place.
        """
    def all_to_all(self, input: torch.Tensor, send_rows: collections.abc.Sequence[typing.SupportsInt], recv_rows: collections.abc.Sequence[typing.SupportsInt], timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        """
        Row blocks of input to all ranks.
        """
    def barrier(self, timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        ...
    def broadcast_(self, tensor: torch.Tensor, root: typing.SupportsInt, timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        """
        The root's tensor to all ranks, in place.
        """
    def flight_record(self) -> str:
        """
        The last calls of this rank over all groups of its world, as JSON.
        """
    def pending_report(self) -> str:
        """
        What this rank waits for now: a line a call, with the peers that are missing.
        """
    def reduce_scatter(self, input: torch.Tensor, rows: collections.abc.Sequence[typing.SupportsInt], timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        """
        Sum over ranks, of which this rank keeps its rows.
        """
    def report(self) -> str:
        """
        What this rank waits for and did before, over its world and all its groups.
        """
    def reset_traffic(self) -> None:
        ...
    def send_receive(self, sends: collections.abc.Sequence[tuple[typing.SupportsInt, torch.Tensor]], receives: collections.abc.Sequence[tuple[typing.SupportsInt, torch.Tensor]], timeout: datetime.timedelta | None = None, purpose: str = 'other') -> Work:
        """
        Grouped sends and receives, each a pair (peer, tensor); receives write in place.
        """
    def set_label(self, step: typing.SupportsInt = -1, instruction: str = '', slot: typing.SupportsInt = -1, unit: typing.SupportsInt = -1, samples: collections.abc.Sequence[typing.SupportsInt] = []) -> None:
        """
        What this rank does from now on: kept with its calls and part of their errors.
        """
    def split(self, color: typing.SupportsInt, key: typing.SupportsInt, name: str) -> Communicator | None:
        """
        Groups by colour, ranks ordered by (key, rank); blocks.
        """
    def traffic(self) -> dict[str, TrafficEntry]:
        """
        Bytes handed to the transport, by purpose.
        """
    def traffic_by_group(self) -> list[GroupTraffic]:
        """
        The accounts of all groups of this group's world; ranks are the world's.
        """
    @property
    def backend(self) -> str:
        ...
    @property
    def deterministic(self) -> bool:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def rank(self) -> int:
        ...
    @property
    def size(self) -> int:
        ...
class Watchdog:
    """
    Turns a hang of this rank into a report, once a hang.
    """
    def __init__(self, world: Communicator, patience: datetime.timedelta, on_hang: collections.abc.Callable[[str], None], folder: str = '') -> None:
        """
        on_hang(report) runs on a thread of the watchdog when a call is pending for longer than `patience` (seconds or a timedelta); the report and the flight record are written to `folder` too where one is given.
        """
    def reports(self) -> int:
        """
        Hangs reported so far.
        """
class RopeConfig:
    """
    Rotary embedding: default, linear, llama3 or yarn.
    """
    @property
    def factor(self) -> float:
        ...
    @property
    def theta(self) -> float:
        ...
    @property
    def type(self) -> str:
        ...
class MoeConfig:
    """
    Mixture of experts; no experts: dense.
    """
    @property
    def aux_loss_coefficient(self) -> float:
        ...
    @property
    def experts(self) -> int:
        ...
    @property
    def experts_per_token(self) -> int:
        ...
    @property
    def intermediate_size(self) -> int:
        ...
    @property
    def normalize_top_k(self) -> bool:
        ...
class ModelConfig:
    """
    A decoder language model, as its Hugging Face config.json says.
    """
    @staticmethod
    def from_json(text: str) -> ModelConfig:
        ...
    @staticmethod
    def load(path: str) -> ModelConfig:
        """
        Reads a config.json. Raises IoError, DataError (a field is missing or wrong) or
        NotSupported (a model_type or feature that is not built), by name.
        """
    def to_json(self) -> str:
        """
        A config.json that transformers opens.
        """
    @property
    def head_dim(self) -> int:
        ...
    @property
    def heads(self) -> int:
        ...
    @property
    def hidden_size(self) -> int:
        ...
    @property
    def intermediate_size(self) -> int:
        ...
    @property
    def kv_heads(self) -> int:
        ...
    @property
    def layers(self) -> int:
        ...
    @property
    def model_type(self) -> str:
        ...
    @property
    def moe(self) -> MoeConfig:
        ...
    @property
    def parameter_count(self) -> int:
        ...
    @property
    def parameters(self) -> list[tuple[str, list[int]]]:
        """
        Hugging Face name and shape of every parameter, in flat order.
        """
    @property
    def rope(self) -> RopeConfig:
        ...
    @property
    def tie_word_embeddings(self) -> bool:
        ...
    @property
    def vocab_size(self) -> int:
        ...
    @property
    def windows(self) -> list[int]:
        ...
class Tokenizer:
    """
    Text to token ids and back.
    """
    def decode(self, tokens: collections.abc.Sequence[typing.SupportsInt]) -> str:
        ...
    def encode(self, text: str) -> list[int]:
        ...
    @property
    def bos(self) -> int:
        """
        -1: none
        """
    @property
    def eos(self) -> int:
        """
        -1: none
        """
    @property
    def fingerprint(self) -> str:
        ...
    @property
    def vocab_size(self) -> int:
        ...
class Document:
    """
    Tokens, and which of them are targets.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: Document) -> bool:
        ...
    def __init__(self, tokens: collections.abc.Sequence[typing.SupportsInt], loss_mask: collections.abc.Sequence[bool] = []) -> None:
        ...
    def __len__(self) -> int:
        ...
    @property
    def loss_mask(self) -> list[int]:
        ...
    @property
    def loss_tokens(self) -> int:
        ...
    @property
    def tokens(self) -> list[int]:
        ...
class Source:
    """
    Documents by index.
    """
    def __getitem__(self, index: typing.SupportsInt) -> Document:
        ...
    def __len__(self) -> int:
        ...
    def describe(self, index: typing.SupportsInt) -> str:
        ...
    @property
    def fingerprint(self) -> str:
        ...
    @property
    def name(self) -> str:
        ...
class DocumentRef:
    """
    A document, or a piece of a long one.
    """
    @property
    def begin(self) -> int:
        ...
    @property
    def document(self) -> int:
        ...
    @property
    def end(self) -> int:
        ...
    @property
    def source(self) -> int:
        ...
class StepMembership:
    """
    What one step trains on.
    """
    @property
    def epoch(self) -> int:
        ...
    @property
    def refs(self) -> list[DocumentRef]:
        ...
    @property
    def samples(self) -> list[meshloom._plan.SampleInfo]:
        ...
    @property
    def skipped_documents(self) -> int:
        ...
    @property
    def split_documents(self) -> int:
        ...
    @property
    def step(self) -> int:
        ...
    @property
    def tokens(self) -> int:
        ...
class Loader:
    """
    Decides step membership: a pure function of options and sources.
    """
    def __init__(self, sources: collections.abc.Sequence[tuple[Source, typing.SupportsFloat]], *, global_batch_tokens: typing.SupportsInt, max_document_tokens: typing.SupportsInt = 0, seed: typing.SupportsInt = 0, held_out_fraction: typing.SupportsFloat = 0.0, vocab_size: typing.SupportsInt = 0, prefetch_steps: typing.SupportsInt = 2, timeout: datetime.timedelta = ...) -> None:
        """
        `sources` are pairs (source, weight); weights are shares of tokens.
        """
    def describe(self, ref: DocumentRef) -> str:
        ...
    def held_out(self, max_tokens: typing.SupportsInt) -> StepMembership:
        ...
    def load(self, ref: DocumentRef) -> Document:
        ...
    def next(self) -> StepMembership:
        """
        Membership of the next step; blocks until its lengths are known.
        """
    def restore(self, state: str) -> None:
        ...
    def state(self) -> str:
        ...
    @property
    def fingerprint(self) -> str:
        ...
class UnitShare:
    """
    This rank's share of one unit. All ranks of the unit make the same calls, in the same order.
    """
    def __init__(self, plan: meshloom._plan.StepPlan, slot: typing.SupportsInt, unit: typing.SupportsInt, hdp: Communicator, documents: collections.abc.Mapping[typing.SupportsInt, Document], device: torch.device) -> None:
        ...
    def attention_backward(self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: typing.SupportsFloat, window: typing.SupportsInt) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        (dq, dk, dv).
        """
    def attention_forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: typing.SupportsFloat, window: typing.SupportsInt) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (out [T, Hq, D], lse [Hq, T]) of causal attention over whole documents.
        """
    @property
    def labels(self) -> torch.Tensor:
        ...
    @property
    def positions(self) -> torch.Tensor:
        ...
    @property
    def tokens(self) -> torch.Tensor:
        ...
class AdamWOptions:
    """
    AdamW; no decay on norms, biases, embeddings.
    """
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def beta1(self) -> float:
        ...
    @beta1.setter
    def beta1(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def beta2(self) -> float:
        ...
    @beta2.setter
    def beta2(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def eps(self) -> float:
        ...
    @eps.setter
    def eps(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def lr(self) -> float:
        ...
    @lr.setter
    def lr(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def weight_decay(self) -> float:
        ...
    @weight_decay.setter
    def weight_decay(self, arg0: typing.SupportsFloat) -> None:
        ...
class ScheduleOptions:
    """
    Linear warm-up, then cosine, linear or constant.
    """
    kind: str
    def __init__(self, **kwargs) -> None:
        ...
    def factor(self, step: typing.SupportsInt, run_steps: typing.SupportsInt) -> float:
        """
        Factor on the learning rate at a step.
        """
    @property
    def final_fraction(self) -> float:
        ...
    @final_fraction.setter
    def final_fraction(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def steps(self) -> int:
        ...
    @steps.setter
    def steps(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def warmup(self) -> int:
        ...
    @warmup.setter
    def warmup(self, arg0: typing.SupportsInt) -> None:
        ...
class ParameterRule:
    """
    Overrides for parameters whose name matches a pattern.
    """
    frozen: bool
    pattern: str
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def lr_factor(self) -> float:
        ...
    @lr_factor.setter
    def lr_factor(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def weight_decay(self) -> float | None:
        ...
    @weight_decay.setter
    def weight_decay(self, arg0: typing.SupportsFloat | None) -> None:
        ...
class ModelSection:
    """
    Where the model comes from; one of the three.
    """
    config: str
    path: str
    preset: str
    def __init__(self, **kwargs) -> None:
        ...
class DataSection:
    """
    What to train on.
    """
    cache: str
    invalid_utf8: str
    tokenizer: str
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def extensions(self) -> list[str]:
        ...
    @extensions.setter
    def extensions(self, arg0: collections.abc.Sequence[str]) -> None:
        ...
    @property
    def held_out_fraction(self) -> float:
        ...
    @held_out_fraction.setter
    def held_out_fraction(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def max_document_tokens(self) -> int:
        ...
    @max_document_tokens.setter
    def max_document_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def paths(self) -> list[str]:
        ...
    @paths.setter
    def paths(self, arg0: collections.abc.Sequence[str]) -> None:
        ...
    @property
    def vocab_size(self) -> int:
        ...
    @vocab_size.setter
    def vocab_size(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def weights(self) -> list[float]:
        ...
    @weights.setter
    def weights(self, arg0: collections.abc.Sequence[typing.SupportsFloat]) -> None:
        ...
class ExpertsSection:
    """
    Which rank of an expert-parallel group holds which expert, while training.
    """
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def least_gain(self) -> float:
        ...
    @least_gain.setter
    def least_gain(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def replan_every(self) -> int:
        ...
    @replan_every.setter
    def replan_every(self, arg0: typing.SupportsInt) -> None:
        ...
class ParallelSection:
    """
    How the model is spread over the layout's ranks.
    """
    experts: ExpertsSection
    pipeline: str
    recompute: str
    split_by: str
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def ranks_per_node(self) -> int:
        ...
    @ranks_per_node.setter
    def ranks_per_node(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def split(self) -> list[int]:
        ...
    @split.setter
    def split(self, arg0: collections.abc.Sequence[typing.SupportsInt]) -> None:
        ...
    @property
    def zero(self) -> int:
        ...
    @zero.setter
    def zero(self, arg0: typing.SupportsInt) -> None:
        ...
class OffloadSection:
    """
    What plans may move to host memory between forward and backward.
    """
    enabled: bool
    folder: str
    def __init__(self, **kwargs) -> None:
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
class CheckpointSection:
    """
    When to save, and how to resume.
    """
    resume: str
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def every_minutes(self) -> float:
        ...
    @every_minutes.setter
    def every_minutes(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def every_steps(self) -> int:
        ...
    @every_steps.setter
    def every_steps(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def keep(self) -> int:
        ...
    @keep.setter
    def keep(self, arg0: typing.SupportsInt) -> None:
        ...
class TrainConfig:
    """
    One training run; fields as docs/train.md lists them. Lists are copied
    on reading: assign a new list to change one.
    """
    aux_loss: str
    checkpoint: CheckpointSection
    cost: meshloom._plan.CostModel | None
    data: DataSection
    deterministic: bool
    device: str
    dtype: str
    exchange: str
    exchange_dtype: str
    layout: meshloom._plan.Layout
    memory_check: str
    model: ModelSection
    nan_policy: str
    offload: OffloadSection
    optimizer: AdamWOptions
    parallel: ParallelSection
    run: str
    save_plans: bool
    schedule: ScheduleOptions
    strategy: str
    @staticmethod
    def from_yaml(text: str, name: str = 'config') -> TrainConfig:
        ...
    @staticmethod
    def load(path: str) -> TrainConfig:
        """
        Reads a YAML file; raises DataError that names file, line and key.
        """
    def __init__(self, **kwargs) -> None:
        ...
    def resolve(self, world_size: typing.SupportsInt, layers: typing.SupportsInt = 0) -> None:
        ...
    def to_yaml(self) -> str:
        ...
    def validate(self) -> None:
        ...
    @property
    def aux_loss_coefficient(self) -> float:
        ...
    @aux_loss_coefficient.setter
    def aux_loss_coefficient(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def bias_update_speed(self) -> float:
        ...
    @bias_update_speed.setter
    def bias_update_speed(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def capacity_tokens(self) -> int:
        ...
    @capacity_tokens.setter
    def capacity_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def clip_norm(self) -> float:
        ...
    @clip_norm.setter
    def clip_norm(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def evaluate_every(self) -> int:
        ...
    @evaluate_every.setter
    def evaluate_every(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def evaluate_tokens(self) -> int:
        ...
    @evaluate_tokens.setter
    def evaluate_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def global_batch_tokens(self) -> int:
        ...
    @global_batch_tokens.setter
    def global_batch_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def rules(self) -> list[ParameterRule]:
        ...
    @rules.setter
    def rules(self, arg0: collections.abc.Sequence[ParameterRule]) -> None:
        ...
    @property
    def seed(self) -> int:
        ...
    @seed.setter
    def seed(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def steps(self) -> int:
        ...
    @steps.setter
    def steps(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def threads(self) -> int:
        ...
    @threads.setter
    def threads(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def timeline_steps(self) -> int:
        ...
    @timeline_steps.setter
    def timeline_steps(self, arg0: typing.SupportsInt) -> None:
        ...
    @property
    def timeout_seconds(self) -> float:
        ...
    @timeout_seconds.setter
    def timeout_seconds(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def watchdog_seconds(self) -> float:
        ...
    @watchdog_seconds.setter
    def watchdog_seconds(self, arg0: typing.SupportsFloat) -> None:
        ...
    @property
    def z_loss_coefficient(self) -> float:
        ...
    @z_loss_coefficient.setter
    def z_loss_coefficient(self, arg0: typing.SupportsFloat) -> None:
        ...
class KindTraffic:
    """
    Communication of one kind in one step, summed over ranks.
    """
    @property
    def between_bytes(self) -> int:
        ...
    @property
    def exposed_seconds(self) -> float:
        ...
    @property
    def inside_bytes(self) -> int:
        ...
    @property
    def seconds(self) -> float:
        ...
class RankTimes:
    """
    One rank's time in one step, in seconds.
    """
    @property
    def busy(self) -> float:
        ...
    @property
    def exposed(self) -> float:
        ...
    @property
    def load(self) -> float:
        ...
    @property
    def planned(self) -> float:
        ...
class StepMetrics:
    """
    One step as everybody sees it.
    """
    def __repr__(self) -> str:
        ...
    @property
    def aux_loss(self) -> float:
        ...
    @property
    def balance_efficiency(self) -> float:
        ...
    @property
    def exchange_bytes(self) -> int:
        ...
    @property
    def extra(self) -> dict[str, float]:
        ...
    @property
    def gradient_norm(self) -> float:
        ...
    @property
    def group_bytes(self) -> dict[str, int]:
        ...
    @property
    def loss(self) -> float:
        ...
    @property
    def loss_tokens(self) -> int:
        ...
    @property
    def lr(self) -> float:
        ...
    @property
    def measured_efficiency(self) -> float:
        ...
    @property
    def planning_seconds(self) -> float:
        ...
    @property
    def ranks(self) -> list[RankTimes]:
        ...
    @property
    def samples(self) -> int:
        ...
    @property
    def seconds(self) -> float:
        ...
    @property
    def skipped(self) -> bool:
        ...
    @property
    def step(self) -> int:
        ...
    @property
    def tokens(self) -> int:
        ...
    @property
    def tokens_per_second(self) -> float:
        ...
    @property
    def traffic(self) -> dict[str, KindTraffic]:
        ...
    @property
    def z_loss(self) -> float:
        ...
class MemoryReport:
    """
    What a run is expected to take of its machines, in bytes.
    """
    def __str__(self) -> str:
        ...
    @property
    def baseline(self) -> list[int]:
        """
        What processes held before anything was built, by world rank.
        """
    @property
    def changes(self) -> list[meshloom._plan.MemoryChange]:
        ...
    @property
    def fits(self) -> bool:
        ...
    @property
    def fullest(self) -> meshloom._plan.MemoryForecast:
        ...
    @property
    def has(self) -> int:
        ...
    @property
    def limits(self) -> meshloom._plan.StepLimits:
        ...
    @property
    def needed(self) -> int:
        ...
    @property
    def setting(self) -> meshloom._plan.MemorySetting:
        ...
    @property
    def stages(self) -> list[meshloom._plan.MemoryForecast]:
        """
        Forecasts of a rank of each stage.
        """
class Trainer:
    """
    Trains one model on one communicator. Every rank makes the same calls (collective).
    Iterating trains with the run folder's records, evaluation and checkpoints.
    """
    @staticmethod
    def request_report() -> None:
        """
        Every trainer of this process soon says in its run folder what it waits for.
        """
    @staticmethod
    def request_stop() -> None:
        """
        Every run of this process finishes its step, saves and returns.
        """
    def __init__(self, config: TrainConfig, model: ModelConfig, loader: Loader, world: Communicator, strategy: meshloom._plan.BalanceStrategy = None, on_hang: collections.abc.Callable[[str], None] = None) -> None:
        ...
    def __iter__(self) -> typing.Any:
        ...
    def __next__(self) -> StepMetrics:
        ...
    def advance(self) -> StepMetrics | None:
        """
        One step with records, evaluation and checkpoints; None once the run has ended.
        """
    def evaluate(self) -> float:
        """
        Mean token loss over held-out documents.
        """
    def run(self, on_step: collections.abc.Callable[[StepMetrics], None] = None) -> None:
        """
        `advance` until the run has ended.
        """
    def save_checkpoint(self) -> None:
        ...
    def save_pretrained(self, folder: str) -> None:
        """
        A folder that Hugging Face transformers opens.
        """
    def step(self) -> StepMetrics:
        """
        One optimizer step, without records.
        """
    @property
    def config(self) -> TrainConfig:
        """
        As resolved.
        """
    @property
    def finished(self) -> bool:
        ...
    @property
    def last_plan(self) -> meshloom._plan.StepPlan:
        ...
    @property
    def memory(self) -> MemoryReport:
        """
        What the run was expected to take, before anything was built.
        """
    @property
    def model_config(self) -> ModelConfig:
        ...
    @property
    def next_step(self) -> int:
        ...
    @property
    def notices(self) -> list[str]:
        """
        What a user should know and no error says, in order of time.
        """
    @property
    def resumed_from(self) -> str:
        ...
class GradientsOptions:
    """
    What `gradients` computes, and how.
    """
    aux_loss: bool
    device: str
    dtype: str
    layout: meshloom._plan.Layout
    model: str
    parallel: ParallelSection
    plan: meshloom._plan.StepPlan | None
    strategy: str
    def __init__(self, **kwargs) -> None:
        ...
    @property
    def capacity_tokens(self) -> int:
        ...
    @capacity_tokens.setter
    def capacity_tokens(self, arg0: typing.SupportsInt) -> None:
        ...
class GradientsResult:
    """
    Loss and all gradients of one step.
    """
    def save(self, path: str) -> None:
        """
        A safetensors file under the model folder's names, and a scalar `loss`.
        """
    @property
    def aux_loss(self) -> float:
        ...
    @property
    def gradients(self) -> list[torch.Tensor]:
        ...
    @property
    def loss(self) -> float:
        ...
    @property
    def names(self) -> list[str]:
        ...
    @property
    def plan(self) -> meshloom._plan.StepPlan:
        ...
def cached(source: Source, folder: str) -> Source:
    """
    The same documents, kept tokenised in a folder that processes share.
    """
def callback_tokenizer(encode: collections.abc.Callable[[str], list[int]], decode: collections.abc.Callable[[collections.abc.Sequence[typing.SupportsInt]], str], *, vocab_size: typing.SupportsInt, bos: typing.SupportsInt = -1, eos: typing.SupportsInt = -1, fingerprint: str) -> Tokenizer:
    """
    A tokenizer behind Python functions; they are called from any thread.
    """
def concatenate(sources: collections.abc.Sequence[Source]) -> Source:
    """
    One source of several, each document equally likely.
    """
def documents_of_iterable(values: collections.abc.Iterable, name: str = 'documents', max_tokens: typing.SupportsInt = 1000000000) -> Source:
    ...
def documents_of_sequence(values: typing.Any, name: str = 'documents') -> Source:
    ...
def export_checkpoint(checkpoint: str, folder: str, dtype: str = 'float32') -> None:
    """
    Writes the model of a checkpoint, of any layout, as a folder that transformers opens.
    """
def gradients(options: GradientsOptions, documents: collections.abc.Sequence[Document], world: Communicator, strategy: meshloom._plan.BalanceStrategy = None) -> GradientsResult:
    """
    One step's loss and all gradients under a layout. Collective.
    `strategy` makes the plan instead of the one that the options name.
    """
def jsonl(paths: collections.abc.Sequence[str], tokenizer: Tokenizer = None, *, add_bos: bool = False, add_eos: bool = True, invalid_utf8: str = 'error') -> Source:
    ...
def load_model_config(config: TrainConfig) -> ModelConfig:
    """
    The model that the config's `model` section describes.
    """
def load_sentencepiece(path: str) -> Tokenizer:
    """
    A SentencePiece model file.
    """
def make_fake_world(rank: typing.SupportsInt, size: typing.SupportsInt, options: GroupOptions = ...) -> Communicator:
    """
    A rank of a world that moves nothing.
    """
def make_mpi_world(options: GroupOptions = ...) -> Communicator:
    """
    The process's place under mpirun.
    """
def make_nccl_world(bootstrap: Communicator, device: typing.SupportsInt, options: GroupOptions = ..., max_communicators: typing.SupportsInt = 24, ctas: tuple[typing.SupportsInt, typing.SupportsInt] = (0, 0), group_ctas: collections.abc.Mapping[str, tuple[typing.SupportsInt, typing.SupportsInt]] = {}) -> Communicator:
    """
    NCCL over CUDA devices, started over a world of the same ranks on the host. ctas: least and most multiprocessors of a communicator, 0 where NCCL decides; group_ctas: by group name.
    """
def make_thread_world(size: typing.SupportsInt, options: GroupOptions = ...) -> list[Communicator]:
    """
    Communicators of one process, one a thread.
    """
def make_world(options: GroupOptions = ...) -> Communicator:
    """
    What the launcher's variables say.
    """
def open_data(config: TrainConfig, vocab_size: typing.SupportsInt, world: Communicator, tokenizer: Tokenizer = None) -> Loader:
    """
    The loader that the config's `data` section describes. Collective.
    """
def report_on_signal(signal: typing.SupportsInt) -> None:
    """
    From now on this signal means Trainer.request_report().
    """
def run_thread_ranks(size: typing.SupportsInt, body: collections.abc.Callable[[Communicator], None], options: GroupOptions = ..., threads_per_rank: typing.SupportsInt = 1) -> None:
    """
    Runs body(communicator) on `size` threads and rethrows the first failure.
    """
def stop_on_signals(signals: collections.abc.Sequence[typing.SupportsInt]) -> None:
    """
    From now on these signals mean Trainer.request_stop(); a second SIGINT ends the process.
    """
def text_folder(paths: collections.abc.Sequence[str], tokenizer: Tokenizer, *, extensions: collections.abc.Sequence[str] = [], add_bos: bool = False, add_eos: bool = True, invalid_utf8: str = 'error') -> Source:
    ...
def train_sentencepiece(files: collections.abc.Sequence[str], model_path: str, *, vocab_size: typing.SupportsInt = 8192, max_bytes: typing.SupportsInt = 15000000, seed: typing.SupportsInt = 0) -> None:
    """
    Trains a byte-fallback BPE on text files and writes it; lossless and deterministic.
    """
__version__: str = '0.1.0'
torch_version: str = '2.11.0'
