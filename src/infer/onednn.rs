//! Convolutions by oneDNN on the CPU, with what follows them done in the same pass.
//!
//! libtorch exports these functions in C for the programs that its own compiler makes; `tch` has no
//! binding for them. Weights are brought once into the order that oneDNN wants. The only file that
//! calls them: what comes in and goes out are `tch` tensors.
#![allow(unsafe_code, reason = "calls C functions of libtorch")]

use std::{
    ffi::{CStr, c_char, c_double, c_void},
    ptr,
};

use tch::{TchError, Tensor};

/// `at::Tensor*`, which is also what [`Tensor::as_ptr`] gives.
type Handle = *mut c_void;

// torch/csrc/inductor/aoti_torch/c/shim_cpu.h of libtorch 2.11, which `Cargo.toml` pins by `tch`.
unsafe extern "C" {
    fn aoti_torch_cpu_mkldnn__convolution_pointwise(
        x: Handle,
        weight: Handle,
        bias: *const Handle,
        padding: *const i64,
        padding_len: i64,
        stride: *const i64,
        stride_len: i64,
        dilation: *const i64,
        dilation_len: i64,
        groups: i64,
        attr: *const c_char,
        scalars: *const *const c_double,
        scalars_len: i64,
        algorithm: *const *const c_char,
        out: *mut Handle,
    ) -> i32;

    fn aoti_torch_cpu_mkldnn__convolution_pointwise_binary_(
        other: Handle,
        x: Handle,
        weight: Handle,
        bias: *const Handle,
        padding: *const i64,
        padding_len: i64,
        stride: *const i64,
        stride_len: i64,
        dilation: *const i64,
        dilation_len: i64,
        groups: i64,
        binary_attr: *const c_char,
        alpha: *const c_double,
        unary_attr: *const *const c_char,
        unary_scalars: *const *const c_double,
        unary_scalars_len: i64,
        unary_algorithm: *const *const c_char,
        out: *mut Handle,
    ) -> i32;
}

/// The batch that weights are packed for.
const BATCH: i64 = 4;

/// What comes after the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Nothing.
    Nothing,
    /// Negative values become 0.
    Relu,
}

/// Where the kernel is laid.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) stride: i64,
    pub(super) padding: i64,
    pub(super) groups: i64,
}

/// A convolution whose weights are in oneDNN's order.
pub(super) struct Packed {
    weight: Tensor,
    bias: Option<Tensor>,
    shape: Shape,
}

impl Packed {
    /// Packs `weight`, `[out, in / groups, height, width]`, for inputs of `side` × `side`. Others give
    /// the same, but oneDNN may bring the weights into another order each time.
    pub(super) fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        shape: Shape,
        side: i64,
    ) -> Result<Packed, TchError> {
        let Shape { stride, padding, groups } = shape;
        let weight = weight.f_contiguous()?.f_to_mkldnn(weight.kind())?;
        let input = [BATCH, weight.size()[1] * groups, side, side];
        let weight = weight.f_mkldnn_reorder_conv2d_weight(
            [padding; 2],
            [stride; 2],
            [1, 1],
            groups,
            input.as_slice(),
        )?;
        let bias = bias.map(Tensor::f_contiguous).transpose()?;
        Ok(Packed { weight, bias, shape })
    }

    /// The same, sharing the weights.
    pub(super) fn share(&self) -> Packed {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Packed { weight: self.weight.shallow_clone(), bias, shape: self.shape }
    }

    /// Of `x`, `[n, in, height, width]` with the channels last in memory; so is what it gives.
    pub(super) fn apply(&self, x: &Tensor, after: After) -> Result<Tensor, TchError> {
        let attr = match after {
            After::Nothing => c"none",
            After::Relu => c"relu",
        };
        let (padding, stride, dilation) = self.lists();
        let bias = self.bias.as_ref().map(handle);
        let mut out = ptr::null_mut();
        // SAFETY: the signature is the header's. Every handle is of a tensor that lives through the
        // call, which borrows them and changes none; so do the lists, each as long as said, and the
        // text, which ends with 0. A null bias, scalars or algorithm is an absent one.
        let failed = unsafe {
            aoti_torch_cpu_mkldnn__convolution_pointwise(
                handle(x),
                handle(&self.weight),
                bias.as_ref().map_or(ptr::null(), ptr::from_ref),
                padding.as_ptr(),
                2,
                stride.as_ptr(),
                2,
                dilation.as_ptr(),
                2,
                self.shape.groups,
                attr.as_ptr(),
                ptr::null(),
                0,
                ptr::null(),
                &raw mut out,
            )
        };
        taken(failed, out)
    }

    /// Adds what [`Packed::apply`] gives for `x` to `y`, in place.
    pub(super) fn add_to(&self, y: Tensor, x: &Tensor) -> Result<Tensor, TchError> {
        const ADD: &CStr = c"add";
        let (padding, stride, dilation) = self.lists();
        let bias = self.bias.as_ref().map(handle);
        let mut out = ptr::null_mut();
        // SAFETY: as above; `y` is changed, and it is ours: nothing else of this crate keeps a view
        // of what it hands in here. A null alpha is 1, and there is nothing after the addition.
        let failed = unsafe {
            aoti_torch_cpu_mkldnn__convolution_pointwise_binary_(
                handle(&y),
                handle(x),
                handle(&self.weight),
                bias.as_ref().map_or(ptr::null(), ptr::from_ref),
                padding.as_ptr(),
                2,
                stride.as_ptr(),
                2,
                dilation.as_ptr(),
                2,
                self.shape.groups,
                ADD.as_ptr(),
                ptr::null(),
                ptr::null(),
                ptr::null(),
                0,
                ptr::null(),
                &raw mut out,
            )
        };
        taken(failed, out)
    }

    fn lists(&self) -> ([i64; 2], [i64; 2], [i64; 2]) {
        ([self.shape.padding; 2], [self.shape.stride; 2], [1, 1])
    }
}

fn handle(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}

/// The tensor that a function gave, which is ours from then on.
fn taken(failed: i32, out: Handle) -> Result<Tensor, TchError> {
    if failed != 0 || out.is_null() {
        // What it was has been written to standard error by libtorch.
        return Err(TchError::Torch("oneDNN refused a convolution".into()));
    }
    // SAFETY: on success it is a new `at::Tensor*`, made with `new`, which belongs to the caller; the
    // tensor frees it with `delete`, as it does its own.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}
