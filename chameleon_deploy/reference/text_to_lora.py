"""Released text-to-LoRA networks (arXiv 2506.06105): `hypermod.pt`, `args.yaml` and `adapter_config.json`.

One network generates the update of every layer from the embedding of a task's description. Embeddings of the layer's
depth and of the module's type tell it for which. The file's tensors have the names that the authors' program writes
(https://github.com/SakanaAI/text-to-lora at 4e7ce39).

Which row of the type embedding belongs to which module is not in the file: it is the order in which the program that
trained the network walked a Python set. The caller says it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from chameleon_deploy.contract.bundle import FloatArray, TargetSpec, factor_names
from chameleon_deploy.contract.peft_lora import PeftConfig, read_config
from chameleon_deploy.errors import CheckpointError, DependencyError, InputError, TensorError
from chameleon_deploy.reference.adapters import adapted
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig
from chameleon_deploy.reference.hypernetwork import FactorModule, FactorTensors, factor_set, place_of
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.reference.targets import choose_targets, target_specs
from chameleon_deploy.terminal.texts import read_conditioned

NETWORK, OPTIONS, UPDATE = "hypermod.pt", "args.yaml", "adapter_config.json"
MAX_OPTIONS_BYTES = 2**22  # the file also lists every training task with its descriptions
MAX_SIZE = 2**20  # of any dimension in the options
MAX_ORDERS = 24  # of module types that are compared by loss
MAX_PICKLE_BYTES = 2**22  # of the names and shapes in hypermod.pt
# What the file has of the updates that training began with and of its targets: the factors of whole models.
_CONSTANTS = ("AB_offset", "mean_recon_target", "std_recon_target")
_NAMES = {
    "task": "task_encoder.mlp.0", "norm_task": "task_encoder.mlp.1",
    "depth": "layer_depth_encoder.0", "depth_norm": "layer_depth_encoder.1",
    "kind": "layer_type_encoder.0", "kind_norm": "layer_type_encoder.1",
    "mixer.0": "mixer.1", "mixer.1": "mixer.4",
    "inner.0.norm": "mlp1.mlp.0", "inner.0.first": "mlp1.mlp.1", "inner.0.second": "mlp1.mlp.4",
    "inner.1.norm": "mlp2.mlp.0", "inner.1.first": "mlp2.mlp.1", "inner.1.second": "mlp2.mlp.4",
    "last.norm": "mlp3.0", "last.first": "mlp3.1", "last.second": "mlp3.4",
}  # fmt: skip


@dataclass(frozen=True)
class TextToLoraFiles:
    """A released network as a command names it.

    directory  with its three files
    order      of the module types, as the process that trained it had them; None where there is one type only
    examples   .jsonl files of texts with their task's vector, by which the orders are compared
    """

    directory: Path
    order: tuple[str, ...] | None = None
    examples: tuple[Path, ...] = ()


def text_to_lora_files(
    directory: Path | None, order: str | None, examples: Sequence[Path] = ()
) -> TextToLoraFiles | None:
    """Return what the options of a command name. Raises InputError for options without the directory."""
    if directory is None:
        if order is not None or examples:
            raise InputError("--target-order and --examples are of a released network: pass --hypernetwork DIR")
        return None
    names = None if order is None else tuple(name.strip() for name in order.split(","))
    return TextToLoraFiles(directory, names, tuple(examples))


class _Options(msgspec.Struct, frozen=True):
    """What args.yaml says about the network; the rest is about training."""

    hypernet_latent_size: int
    head_in_size: int
    exp_setup: str = "hyper_lora"
    training_task: str = "sft"
    encoder_type: str = "linear"
    shared_AB_head: bool = False
    autoreg_gen: bool = False
    factorized: bool = False
    pred_z_score: bool | None = None
    delta_w_scaling: float = 10000.0
    mt_lora_path: str | None = None
    emb_model: str | None = None
    use_one_hot_task_emb: bool = False

    @property
    def head_has_bias(self) -> bool:
        return self.training_task == "recon" or self.mt_lora_path is None

    @property
    def head_scale(self) -> float:
        """Return what the heads' outputs are multiplied by: training on other LoRAs enlarges their product."""
        return 1 / math.sqrt(self.delta_w_scaling) if self.training_task == "recon" else 1.0


class Residual(nn.Module):
    """LayerNorm, Linear, SiLU, Linear, SiLU; `second` may lead to another width."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.silu(self.first(self.norm(x)))
        return functional.silu(self.second(inner))


class TextToLora(FactorModule):
    """The network, without the dropout of its training.

    types    names of modules such as q_proj, in the order of the type embedding's rows
    offsets  a constant part of the factors, by module and then A [layers, rank, in] and B [layers, out, rank]
    scale    of the heads' outputs
    emb_model  the encoder that it was trained with; none: the base model itself
    """

    def __init__(self, size: int, targets: Sequence[TargetSpec], rank: int, types: Sequence[str], shape: _Options):
        super().__init__(targets, rank)
        self.types, self.scale = tuple(types), shape.head_scale
        self.emb_model = None if shape.use_one_hot_task_emb else shape.emb_model
        self.offsets: dict[str, tuple[Tensor, Tensor]] = {}
        self.places = _places(targets, types)  # of each target: its depth and the row of its type
        latent, layers = shape.hypernet_latent_size, len(targets) // len(types)
        self.task, self.norm_task = nn.Linear(size, latent // 2), nn.LayerNorm(latent // 2)
        self.depth, self.depth_norm = nn.Embedding(layers, latent // 4), nn.LayerNorm(latent // 4)
        self.kind, self.kind_norm = nn.Embedding(len(types), latent // 4), nn.LayerNorm(latent // 4)
        width = latent // 2 + 2 * (latent // 4)
        self.mixer = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])
        self.inner = nn.ModuleList(Residual(width, width) for _ in range(2))
        self.last = Residual(width, shape.head_in_size)
        self.is_shared = shape.shared_AB_head
        self.heads = nn.ModuleDict()
        for name in types:
            one = self.targets_of(name)[0]
            widths = (one.in_features, one.out_features)
            outputs = rank * (max(widths) if self.is_shared else sum(widths))
            self.heads[name] = nn.Linear(shape.head_in_size, outputs, bias=shape.head_has_bias)
        if self.is_shared:  # one head gives A and B of a module, told apart by an embedding
            self.halves = nn.ParameterDict({f"{name}_{half}": torch.empty(width) for name in types for half in "AB"})
            self.half_norm = nn.LayerNorm(width)

    def stored_name(self, parameter: str) -> str:
        """Return the name in hypermod.pt."""
        module, _, kind = parameter.rpartition(".")
        if module == "halves":
            name, _, half = kind.rpartition("_")
            return f"out_emb.{name}.{half}"
        if module == "half_norm":
            return f"out_emb_norm.{kind}"
        return f"{_NAMES.get(module, module)}.{kind}"

    def begin_at_base(self, conditioning: Tensor) -> None:
        """Raises CheckpointError: this network is trained elsewhere."""
        raise CheckpointError("a released text-to-LoRA network is deployed here and not trained")

    def forward(self, conditioning: Tensor) -> FactorTensors:
        """See `FactorModule`."""
        task = self.norm_task(self.task(conditioning))[:, None]  # [sets, 1, latent / 2]
        places = self.place_embeddings()  # [targets, latent / 2]
        x = torch.cat([task.expand(-1, len(places), -1), places.expand(len(task), -1, -1)], 2)
        for layer in self.mixer:
            x = functional.silu(layer(x))
        x = x + self.inner[0](x)  # [sets, targets, width]
        names = [target.name for target in self.targets]
        factors: FactorTensors = {}
        for name, half in itertools.product(self.types, range(2)):
            targets = self.targets_of(name)
            own = x[:, [names.index(target.name) for target in targets]]  # [sets, layers, width]
            if self.is_shared:
                own = own + self.half_norm(self.halves[f"{name}_{'AB'[half]}"])
            weight, constant = self.head(name, half)
            flat = self.last(own + self.inner[1](own)) @ weight.T + constant
            for target, values in zip(targets, flat.unflatten(2, (self.rank, -1)).unbind(1), strict=True):
                factors[factor_names(target.name)[half]] = values.mT if half else values
        return factors

    def encoder_fault(self, pooling: str) -> str | None:
        """Return why an encoder that pools like this cannot stand for the one of the training, or None."""
        if not self.emb_model:
            return "the network was not trained with an encoder: give vectors as conditioning="
        if "gte" in self.emb_model and pooling != "cls":
            return f"it pools by {pooling}, and the network was trained with the first token of {self.emb_model}"
        return None

    def mixer_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.mixer if isinstance(layer, nn.Linear)]

    def place_embeddings(self) -> Tensor:
        """Return the normed embeddings of every target's depth and type, side by side [targets, latent / 2]."""
        depths, rows = (list(column) for column in zip(*self.places, strict=True))
        return torch.cat([self.depth_norm(self.depth.weight)[depths], self.kind_norm(self.kind.weight)[rows]], 1)

    def head(self, name: str, half: int) -> tuple[Tensor, Tensor]:
        """Return the layer that gives A (0) or B (1) of a module in every layer of the base: weight [rank * width,
        head_in] and constant [layers or 1, rank * width].
        """
        target = self.targets_of(name)[0]
        width = (target.in_features, target.out_features)[half]

        def rows(parameter: Tensor) -> Tensor:
            before = half * self.rank * target.in_features
            own = parameter[before : before + self.rank * width]
            if self.is_shared:
                own = parameter.unflatten(0, (self.rank, -1))[:, :width].flatten(0, 1)
            return own * self.scale

        weight, bias = (getattr(self.heads[name], kind) for kind in ("weight", "bias"))
        constant = torch.zeros(1, self.rank * width) if bias is None else rows(bias)[None]
        if name in self.offsets:
            offset = self.offsets[name][half]
            constant = constant + (offset.mT if half else offset).flatten(1)
        return rows(weight), constant

    def targets_of(self, name: str) -> list[TargetSpec]:
        """Return the targets of one type, in the order of the layers."""
        return sorted(
            (target for target in self.targets if _type(target) == name),
            key=lambda target: place_of(target.name)[0] or 0,
        )


def load_text_to_lora(base: str, files: TextToLoraFiles) -> Checkpoint:
    """Load a released network for a base model.

    Raises CheckpointError for files that are not such a network's or have an option that is not deployed, TensorError
    for tensors that do not fit, InputError for an order of types that is missing or contradicted by the examples, and
    what `load_trunk` and `read_conditioned` raise.
    """
    directory = files.directory
    options, update = _read_options(directory / OPTIONS), read_config(directory / UPDATE)
    types = _types(directory / UPDATE, update)
    state, trunk = _read_state(directory / NETWORK), load_trunk(base)
    names = choose_targets(trunk, types)
    targets = target_specs(trunk, names)
    order = files.order or (tuple(types) if len(types) == 1 else None)
    if order is not None and sorted(order) != sorted(types):
        raise InputError(f"--target-order {','.join(order)}: name each of {', '.join(types)} once")
    network = _assemble(directory / NETWORK, state, targets, order or types, update.r, options)
    scaling = update.scaling(names[0])
    losses = _losses(trunk, network, scaling, files.examples) if len(types) > 1 and files.examples else {}
    _require_order(directory, order, types, [name for name in _heads(state) if name in types], losses)
    digest = hashlib.sha256(",".join(order or types).encode())
    for name in (NETWORK, OPTIONS, UPDATE):
        digest.update((directory / name).read_bytes())
    config = CheckpointConfig(
        regime="chameleon", base_model=base, rank=update.r, alpha=scaling, num_clusters=0,
        max_length=trunk.max_positions, targets=names, conditioning_size=network.task.in_features,
    )  # fmt: skip
    return Checkpoint(config, trunk, network, torch.empty(0, trunk.config.hidden_size), digest.hexdigest())


def order_losses(
    trunk: Trunk, network: TextToLora, scaling: float, texts: Sequence[str], vectors: FloatArray
) -> dict[tuple[str, ...], float]:
    """Return the mean loss per token of texts, each with the update of its vector, under every order of the types.

    Raises InputError for vectors of another size, texts without a second token, or more types than are compared.
    """
    orders = list(itertools.permutations(sorted(network.types)))
    if len(orders) > MAX_ORDERS:
        raise InputError(f"{len(network.types)} types of modules have {len(orders)} orders: {MAX_ORDERS} are compared")
    if vectors.shape[1] != network.task.in_features:
        raise InputError(f"examples have vectors of {vectors.shape[1]} numbers, not {network.task.in_features}")
    encodings = [trunk.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    rows = [ids[: trunk.max_positions] for ids in encodings]
    if min(map(len, rows)) < 2:
        raise InputError("an example has fewer than two tokens: nothing of it can be predicted")
    own, losses = network.types, {}
    for order in orders:
        _set_order(network, order)
        with torch.no_grad():
            factors = network(torch.from_numpy(vectors))
            total = 0.0
            for i, ids in enumerate(rows):
                with adapted(trunk, factor_set(factors, i, scaling)):
                    hidden, _ = trunk.hidden_states(torch.tensor([ids]))
                    logits = trunk.logits(hidden[0, :-1])
                total += float(functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        losses[order] = total / sum(len(ids) - 1 for ids in rows)
    _set_order(network, own)
    return losses


def _losses(
    trunk: Trunk, network: TextToLora, scaling: float, examples: Sequence[Path]
) -> dict[tuple[str, ...], float]:
    texts, vectors = read_conditioned(examples)
    return order_losses(trunk, network, scaling, texts, vectors)


def _require_order(
    directory: Path,
    order: tuple[str, ...] | None,
    types: Sequence[str],
    listed: Sequence[str],
    losses: Mapping[tuple[str, ...], float],
) -> None:
    """Raise InputError unless the order is known and no other has a smaller loss.

    listed  the modules in the order in which the file lists their heads
    """
    found = "; ".join(f"{','.join(each)} has the loss {loss:.4f}" for each, loss in losses.items())
    if order is None:
        checked = f"on the examples {found}" if losses else "--examples FILE.jsonl compares the orders by loss"
        raise InputError(
            f"{directory} does not say which row of its type embedding belongs to which of {', '.join(sorted(types))}: "
            f"pass --target-order, such as {','.join(listed)}, in which {NETWORK} lists its heads, the order of the "
            f"process that wrote it ({checked})"
        )
    best = min(losses, key=lambda each: losses[each], default=order)
    if losses and losses[best] < losses[order]:
        raise InputError(f"--target-order {','.join(order)} does not fit {directory}: on the examples {found}")


def _set_order(network: TextToLora, order: Sequence[str]) -> None:
    network.types, network.places = tuple(order), _places(network.targets, order)


def _places(targets: Sequence[TargetSpec], types: Sequence[str]) -> list[tuple[int, int]]:
    """Return each target's depth and the row of its type. Raises CheckpointError unless every layer has every type,
    of one shape.
    """
    found: dict[tuple[int, str], TargetSpec] = {}
    for target in targets:
        depth, module = place_of(target.name)
        if depth is not None:
            found[depth, module.rpartition(".")[2]] = target
    layers = 1 + max((depth for depth, _ in found), default=-1)
    if len(found) != len(targets) or len(found) != layers * len(types):
        raise CheckpointError(
            f"a text-to-LoRA network updates {', '.join(types)} once in every layer of its base model"
        )
    shapes = {(name, target.in_features, target.out_features) for (_, name), target in found.items()}
    if len(shapes) != len(types):
        raise CheckpointError(f"layers of this base model differ in shape: the network has one head per {types}")
    places = ((place_of(target.name)[0], _type(target)) for target in targets)
    return [(int(depth or 0), list(types).index(name)) for depth, name in places]


def _type(target: TargetSpec) -> str:
    return target.name.rpartition(".")[2]


def _types(file: Path, update: PeftConfig) -> list[str]:
    """Return the names of the modules. Raises CheckpointError for options of PEFT that the networks do not have."""
    names = update.target_modules
    set_options = [
        name
        for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(update, name)
    ]
    if set_options:
        raise CheckpointError(f"{file}: {', '.join(set_options)}: a text-to-LoRA network updates every layer alike")
    if isinstance(names, str) or not names or len(set(names)) < len(names) or any("." in name for name in names):
        raise CheckpointError(f"{file}: target_modules {names!r:.80} is no list of distinct module names")
    return sorted(names)


def _read_options(file: Path) -> _Options:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise DependencyError(f"{file}: pip install pyyaml") from error
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_OPTIONS_BYTES + 1)
        if len(content) > MAX_OPTIONS_BYTES:
            raise CheckpointError(f"{file}: over {MAX_OPTIONS_BYTES} bytes are no options of a text-to-LoRA network")
        raw = yaml.safe_load(content)
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file}: not a mapping of options")
        # Only these values are looked at: aliases in others may stand for a huge tree.
        own = {name: raw[name] for name in _Options.__struct_fields__ if name in raw}
        options = msgspec.convert(own, _Options)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # msgspec's and Unicode's are ValueErrors
        raise CheckpointError(f"{file}: {' '.join(str(error).split())[:300]}") from error
    refused = [
        f"{name}={getattr(options, name)}"
        for name, taken in (
            ("exp_setup", ("hyper_lora",)), ("training_task", ("sft", "recon")), ("encoder_type", ("linear",)),
            ("autoreg_gen", (False,)),
        )
        if getattr(options, name) not in taken
    ]  # fmt: skip
    if options.training_task == "recon":
        refused += [f"{name} with training_task=recon" for name in ("factorized", "pred_z_score", "mt_lora_path")
                    if getattr(options, name)]  # fmt: skip
    if refused:
        raise CheckpointError(f"{file}: {', '.join(refused)}: this release does not deploy it")
    sizes = options.hypernet_latent_size, options.head_in_size
    if not all(1 <= size <= MAX_SIZE for size in sizes) or options.hypernet_latent_size < 4:
        raise CheckpointError(f"{file}: hypernet_latent_size and head_in_size must be from 4 and 1 to {MAX_SIZE}")
    if not (math.isfinite(options.delta_w_scaling) and options.delta_w_scaling > 0):
        raise CheckpointError(f"{file}: delta_w_scaling must be positive")
    return options


def _read_state(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, mapped and not read. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{file}: not a file that torch.save wrote: {error}") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{file}: a compressed archive, which torch.save does not write")
    if max((member.file_size for member in members if member.filename.endswith(".pkl")), default=0) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{file}: its list of tensors has more than {MAX_PICKLE_BYTES} bytes")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{file}: not a state dict that loads with weights_only=True: {type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(n, str) for n, t in state.items()):
        raise CheckpointError(f"{file}: not a state dict of tensors")
    return state


def _heads(state: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that have a head, in the file's order."""
    return [name.split(".")[1] for name in state if name.startswith("heads.") and name.endswith(".weight")]


def _assemble(
    file: Path,
    state: Mapping[str, Tensor],
    targets: Sequence[TargetSpec],
    types: Sequence[str],
    rank: int,
    options: _Options,
) -> TextToLora:
    first = state.get(f"{_NAMES['task']}.weight")
    if first is None or first.ndim != 2 or not 1 <= first.shape[1] <= MAX_SIZE:
        raise TensorError(f"{file}: tensor {_NAMES['task']}.weight [latent, task embedding] is missing")
    with torch.device("meta"):  # shapes only, which take no memory: the options may contain any size
        network = TextToLora(first.shape[1], targets, rank, types, options)
    expected = {network.stored_name(name): tuple(p.shape) for name, p in network.named_parameters()}
    constants = _constant_shapes(network)
    for name, shape in expected.items():
        if name not in state:
            raise TensorError(f"{file}: tensor {name} is missing")
        _check_tensor(file, name, state[name], shape)
    for name, tensor in state.items():
        if name in constants:
            _check_tensor(file, name, tensor, constants[name])
        elif name not in expected:
            raise TensorError(f"{file}: unexpected tensor {name}: it is of an option that {OPTIONS} does not name")
    stored = {name: network.stored_name(name) for name, _ in network.named_parameters()}
    network.load_state_dict({name: state[key].to(torch.float32) for name, key in stored.items()}, assign=True)
    offsets: dict[str, tuple[Tensor, Tensor]] = {}
    for name in types:
        pair = [state[key].to(torch.float32) for half in "AB" if (key := f"AB_offset.{half}.{name}") in state]
        if len(pair) == 2:
            offsets[name] = pair[0], pair[1]
    if options.mt_lora_path is not None and len(offsets) < len(types):
        raise TensorError(f"{file}: AB_offset is missing, which training with mt_lora_path={options.mt_lora_path} adds")
    network.offsets = offsets if options.training_task == "sft" else {}
    network.eval().requires_grad_(False)
    return network


def _constant_shapes(network: TextToLora) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of the tensors that are no parameters of the network."""
    shapes, rank, layers = {}, network.rank, network.depth.num_embeddings
    for target in network.targets:
        name = _type(target)
        for constant in _CONSTANTS:
            shapes[f"{constant}.A.{name}"] = (layers, rank, target.in_features)
            shapes[f"{constant}.B.{name}"] = (layers, target.out_features, rank)
    return shapes


def _check_tensor(file: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise TensorError(f"{file}: {name} has shape {tuple(tensor.shape)}, this base model and {OPTIONS} need {shape}")
    if not tensor.is_floating_point():
        raise TensorError(f"{file}: {name} has dtype {tensor.dtype}, expected floating point")
    if not torch.isfinite(tensor).all():
        raise TensorError(f"{file}: {name} holds NaN or infinity")
