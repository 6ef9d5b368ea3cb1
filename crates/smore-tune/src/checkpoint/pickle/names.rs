//! The few names of Python and PyTorch that a file of tensors needs.

use super::{Reading, quoted};

/// How a storage's values are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Element {
    F32,
    F16,
    Bf16,
    F64,
    /// PyTorch's name of a kind that is known and not read.
    Unread(&'static str),
}

impl Element {
    const UNREAD: [&'static str; 8] = [
        "LongStorage",
        "IntStorage",
        "ShortStorage",
        "CharStorage",
        "ByteStorage",
        "BoolStorage",
        "ComplexFloatStorage",
        "ComplexDoubleStorage",
    ];

    /// The kind that `torch.NAME` stores.
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "DoubleStorage" => Self::F64,
            _ => Self::Unread(Self::UNREAD.into_iter().find(|unread| *unread == name)?),
        })
    }

    /// Bytes of one value; none of a kind that is not read.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F64 => 8,
            Self::Unread(_) => 0,
        }
    }

    /// Value `i` of a storage.
    ///
    /// # Panics
    /// If the storage ends before it, or is of a kind that is not read.
    pub(super) fn at(self, storage: &[u8], i: usize) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes(storage.as_chunks().0[i]),
            Self::F16 => half::f16::from_le_bytes(storage.as_chunks().0[i]).to_f32(),
            Self::Bf16 => half::bf16::from_le_bytes(storage.as_chunks().0[i]).to_f32(),
            Self::F64 => f64::from_le_bytes(storage.as_chunks().0[i]) as f32,
            Self::Unread(kind) => panic!("a tensor of {kind} was to be refused"),
        }
    }
}

/// What a pickle may name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Element),
}

impl Global {
    /// The name `module.name`, if it is one of them.
    pub(super) fn named(module: &str, name: &str) -> Reading<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", name) => Element::named(name).map(Self::Storage),
            _ => None,
        }
        .ok_or_else(|| {
            let called = quoted(&format!("{module}.{name}"));
            format!("wants to call {called}; only tensors are read, nothing was executed")
        })
    }

    /// How a message calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OrderedDict => "`collections.OrderedDict`",
            Self::RebuildTensor => "`torch._utils._rebuild_tensor_v2`",
            Self::RebuildParameter => "`torch._utils._rebuild_parameter`",
            Self::Storage(_) => "a storage of `torch`",
        }
    }
}
