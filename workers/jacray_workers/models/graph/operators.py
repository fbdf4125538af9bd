"""The operators that a graph file may call: an allow-list of aten's names, and a check of every argument's type.

What stands here computes tensors from tensors and numbers, and nothing else: no operator that reads or writes files,
runs code, reaches memory by raw strides, or makes a shape that depends on data.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models.graph.values import Here, Ref, State

NAMES: frozenset[str] = frozenset(  # one text: hundreds of quoted names would hide what they say
    """
    abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh arctan2 bitwise_and bitwise_not bitwise_or
    bitwise_xor __and__ __or__ __xor__ ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad div divide digamma
    eq erf erfc erfinv exp exp2 expm1 fill float_power floor floor_divide fmod frac ge gt greater greater_equal hypot
    isfinite isinf isnan isclose ldexp le lt less less_equal lerp lgamma log log10 log1p log2 logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit masked_fill maximum max minimum min mul multiply nan_to_num ne
    not_equal neg negative nextafter pow positive polygamma rad2deg reciprocal remainder round rsqrt rsub sgn sigmoid
    sign sin sinc sinh special_bessel_j0 special_bessel_j1 special_i0 special_i0e special_i1 special_i1e special_erf
    special_erfc special_erfinv special_expit special_exp2 special_expm1 special_log1p special_logit special_sinc
    special_xlogy special_xlog1py special_entr special_ndtr special_ndtri special_log_ndtr special_digamma
    special_gammaln special_logsumexp special_softmax special_log_softmax special_erfcx sqrt square sub subtract tan
    tanh true_divide trunc where xlogy zero i0

    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu relu relu6
    rrelu selu silu softmax softplus softshrink threshold _softmax _log_softmax softmin

    all amax amin aminmax any argmax argmin argsort cummax cummin cumprod cumsum logcumsumexp logsumexp mean median
    nanmean nanmedian nansum norm prod sort std std_mean sum topk var var_mean kthvalue quantile msort count_nonzero
    frobenius_norm nuclear_norm renorm

    addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul cholesky_solve cosine_similarity cross dist dot
    einsum inner kron linalg_cholesky linalg_cholesky_ex linalg_cross linalg_det linalg_eigh linalg_eigvalsh linalg_inv
    linalg_inv_ex linalg_lu linalg_lu_factor linalg_lu_solve linalg_matmul linalg_matrix_exp linalg_matrix_norm
    linalg_matrix_power linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_solve_ex
    linalg_solve_triangular linalg_svd linalg_svdvals linalg_vecdot linalg_vector_norm linear det inverse logdet slogdet
    matmul matrix_exp matrix_power mm mv outer pairwise_distance pdist tensordot trace trapezoid cumulative_trapezoid
    triangular_solve vander vdot _cdist_forward _linalg_det _linalg_slogdet _linalg_solve_ex _linalg_eigh _linalg_svd

    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm channel_shuffle conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d convolution dropout feature_dropout alpha_dropout
    feature_alpha_dropout embedding group_norm instance_norm layer_norm rms_norm local_response_norm max_pool1d
    max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices native_batch_norm
    native_group_norm native_layer_norm _native_batch_norm_legit_no_training _native_batch_norm_legit
    native_channel_shuffle _weight_norm _weight_norm_interface _fused_rms_norm scaled_dot_product_attention lstm gru
    rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell grid_sampler grid_sampler_2d grid_sampler_3d
    affine_grid_generator im2col col2im pixel_shuffle pixel_unshuffle upsample_nearest1d upsample_nearest2d
    upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa pad
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d _pad_circular

    binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss huber_loss kl_div l1_loss mse_loss
    nll_loss nll_loss_nd smooth_l1_loss soft_margin_loss

    alias atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cartesian_prod cat chunk clone
    column_stack concat concatenate constant contiguous copy detach diag diag_embed diagonal diagonal_scatter diff
    dsplit dstack expand expand_as flatten flip fliplr flipud gather hsplit hstack index index_add index_copy index_fill
    index_put index_select lift_fresh lift_fresh_copy masked_scatter meshgrid mH mT matrix_H movedim moveaxis narrow
    numpy_T permute ravel repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack
    scatter scatter_add scatter_reduce select select_scatter slice slice_scatter split split_with_sizes squeeze stack
    swapaxes swapdims t take take_along_dim tensor_split tile to _to_copy transpose tril triu type_as unbind unflatten
    unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as vsplit vstack _unsafe_view
    _reshape_alias _unsafe_index _shape_as_tensor bucketize searchsorted one_hot

    arange empty empty_like eye full full_like linspace logspace new_empty new_full new_ones new_zeros ones ones_like
    scalar_tensor tril_indices triu_indices zeros zeros_like hann_window hamming_window blackman_window
    bernoulli multinomial normal rand rand_like randn randn_like uniform exponential poisson

    complex conj conj_physical _conj _conj_physical angle imag polar real view_as_complex view_as_real _neg_view
    fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft
    fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fft_fftfreq fft_rfftfreq _fft_r2c _fft_c2r _fft_c2c
    stft istft
    """.split()  # noqa: SIM905
)
"""Names of aten's operators, without overload and without the underscore of the variant that writes in place."""

_DTYPES = frozenset(
    """float64 float32 bfloat16 float16 complex128 complex64 int64 int32 int16 int8 uint8 bool""".split()  # noqa: SIM905
)
_TEXT = re.compile(r"^[A-Za-z0-9_.,> -]{0,200}$")
_END = 2**63 - 1
MAX_INTEGER = 2**31
"""The largest whole number that an argument may hold, besides the largest of all, which stands for 'to the end'."""


def _size(x: Tensor, dim: int) -> int:
    return x.shape[dim]


def _item(values: Sequence[Any], place: int) -> Any:
    return values[place]


INTEGERS: Mapping[str, tuple[Callable[..., Any], int]] = {
    "int.add": (operator.add, 2),
    "int.sub": (operator.sub, 2),
    "int.mul": (operator.mul, 2),
    "int.floordiv": (operator.floordiv, 2),
    "int.mod": (operator.mod, 2),
    "int.neg": (operator.neg, 1),
    "int.max": (max, 2),
    "int.min": (min, 2),
}
"""Arithmetic of sizes, with the number of its arguments."""


@dataclass(frozen=True)
class Operator:
    """An allowed operator.

    Attributes:
        name: as graph files write it.
        function: what runs.
        result: `tensor`, `int`, or `several` for a tuple or list of tensors.
        count: how many tensors `several` are, or None where it depends on the arguments.
        writes: it writes into its first argument.
        makes: it makes a tensor from numbers alone, on a device that it is told.
        arguments: the schema's arguments, None for those that are not torch's.
    """

    name: str
    function: Callable[..., Any]
    result: str
    count: int | None
    writes: bool
    arguments: tuple[Any, ...] | None
    makes: bool = False


@functools.cache
def find(name: str) -> Operator:
    """The operator of this name.

    Raises:
        ModelError: it is not on the list.
    """
    if name in INTEGERS:
        return Operator(name, INTEGERS[name][0], "int", None, False, None)
    if name == "size":
        return Operator(name, _size, "int", None, False, None)
    if name == "item":
        return Operator(name, _item, "tensor", None, False, None)
    found = _of_torch(name)
    if found is None:
        way_out = "graph files may call the operators that `jacray_workers.models.graph.operators` lists"
        raise ModelError("model", "calls an operator that is not allowed in a graph file", name, way_out)
    return found


def _of_torch(name: str) -> Operator | None:
    library, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    if library != "aten" or not is_allowed(base):
        return None
    packet = getattr(torch.ops.aten, base, None)
    if packet is None or overload not in packet.overloads():
        return None
    function = getattr(packet, overload)
    schema = function._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    returns = [str(r.type) for r in schema.returns]
    if written not in ([], [schema.arguments[0].name]) or not returns or "Dimname" in str(schema):
        return None
    if any(r not in ("Tensor", "List[Tensor]") for r in returns):
        return None
    single = returns == ["Tensor"]
    count = None if single or returns == ["List[Tensor]"] else len(returns)
    makes = any(a.name == "device" for a in schema.arguments) and not any(
        "Tensor" in str(a.type) for a in schema.arguments
    )
    arguments = tuple(schema.arguments)
    return Operator(name, function, "tensor" if single else "several", count, bool(written), arguments, makes)


def is_allowed(base: str) -> bool:
    """Whether an aten operator's name, with or without the underscore of writing in place, is on the list."""
    return base in NAMES or (base.endswith("_") and not base.endswith("__") and base[:-1] in NAMES)


def check_call(found: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Callable[[Any], str]) -> None:
    """Refuse arguments that do not fit the operator.

    Args:
        found: the operator.
        args: decoded positional arguments, references included.
        kwargs: decoded keyword arguments.
        kinds: what a reference stands for: `tensor`, `int` or `several`.

    Raises:
        ModelError: naming the operator, the argument and what it must be.
    """
    if found.arguments is None:
        _check_own(found, args, kwargs, kinds)
        return
    positional = [a for a in found.arguments if not a.kwarg_only]
    given = dict(zip([a.name for a in positional], args, strict=False))
    if len(args) > len(positional) or set(given) & set(kwargs):
        raise _unfit(found, "has too many arguments")
    given |= kwargs
    for argument in found.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise _unfit(found, f"lacks the argument {argument.name}")
            continue
        wanted = str(argument.real_type)
        if not _fits(given.pop(argument.name), wanted, kinds):
            raise _unfit(found, f"must have a {wanted} as {argument.name}")
    if given:
        raise _unfit(found, f"has no argument {next(iter(given))}")


def _check_own(found: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Callable[[Any], str]) -> None:
    first = {"size": ("Tensor", "int"), "item": ("several", "int")}.get(found.name)
    wanted = first or ("int",) * INTEGERS[found.name][1]
    if kwargs or len(args) != len(wanted):
        raise _unfit(found, f"takes {len(wanted)} arguments")
    for value, kind in zip(args, wanted, strict=True):
        several = kind == "several" and isinstance(value, Ref) and kinds(value) == "several"
        if not several and not _fits(value, kind, kinds):
            raise _unfit(found, f"must have arguments of the kinds {', '.join(wanted)}")
    if found.name in ("size", "item") and not isinstance(args[1], int):
        raise _unfit(found, "must have a plain number as its second argument")


def _unfit(found: Operator, what: str) -> ModelError:
    return ModelError("model", f"calls {found.name} with arguments that do not fit: it {what}", Plain("a graph file"))


def _fits(value: Any, wanted: str, kinds: Callable[[Any], str]) -> bool:
    if wanted.startswith("Optional["):
        return value is None or _fits(value, wanted[9:-1], kinds)
    if wanted.startswith("List["):
        inner = wanted[5:-1]
        if isinstance(value, Ref):
            return inner == "Tensor" and kinds(value) == "several"
        # A single number stands for a list of as many as are wanted.
        return (
            all(_fits(v, inner, kinds) for v in value)
            if isinstance(value, list)
            else inner in ("int", "float", "bool") and _fits(value, inner, kinds)
        )
    if isinstance(value, Ref | State):
        kind = kinds(value)
        return kind == "tensor" if wanted == "Tensor" else kind == "int" and wanted in ("int", "number", "float")
    check = _CHECKS.get(wanted)
    return check is not None and check(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (abs(value) <= MAX_INTEGER or value == _END)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "int": _whole,
    "float": lambda v: isinstance(v, float) or _whole(v),
    "number": lambda v: isinstance(v, float | bool) or _whole(v),
    "bool": lambda v: isinstance(v, bool),
    "Tensor": lambda v: isinstance(v, float | bool) or _whole(v),  # torch takes a number for a tensor without axes
    "str": lambda v: isinstance(v, str) and bool(_TEXT.match(v)),
    "ScalarType": lambda v: isinstance(v, torch.dtype) and str(v).removeprefix("torch.") in _DTYPES,
    "Layout": lambda v: v is torch.strided,
    "MemoryFormat": lambda v: isinstance(v, torch.memory_format),
    "Device": lambda v: isinstance(v, Here),
    "Generator": lambda v: v is None,
}
