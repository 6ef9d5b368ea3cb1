//! Which linear maps an adapter sits on, as a user or an adapter file says it.
//!
//! Matching names against a model's module paths is up to who knows the model.

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Which linear maps to adapt, by the rules of PEFT's `target_modules`.
///
/// Written as a list of names, a pattern, or a map with the keys `modules`, `exclude` and `blocks`:
///
/// ```
/// use smore::targets::{Modules, Targets};
/// let names: Targets = serde_json::from_str(r#"["gate_proj", "up_proj"]"#)?;
/// assert_eq!(names, Targets::from(["gate_proj", "up_proj"]));
/// let some: Targets = serde_json::from_str(r#"{"modules": ".*mlp.*", "blocks": [0, 1]}"#)?;
/// assert_eq!(some.modules, Modules::Pattern(".*mlp.*".into()));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Targets {
    /// The modules to adapt.
    pub modules: Modules,
    /// Modules to leave alone although `modules` names them.
    pub exclude: Option<Modules>,
    /// Transformer blocks to adapt; all where absent.
    pub blocks: Option<Vec<usize>>,
}

/// Modules by name or by pattern.
#[derive(Clone, Debug, PartialEq)]
pub enum Modules {
    /// Module paths or their last parts: `q_proj` is every module whose path is `q_proj` or ends in
    /// `.q_proj`.
    Names(Vec<String>),
    /// A regular expression that matches the whole path, or `all-linear`: every linear map but the
    /// output head.
    Pattern(String),
}

impl Default for Targets {
    /// The FFN, as in the paper.
    fn default() -> Self {
        Self::from(["gate_proj", "up_proj", "down_proj"])
    }
}

impl From<Modules> for Targets {
    fn from(modules: Modules) -> Self {
        Self { modules, exclude: None, blocks: None }
    }
}

impl<const N: usize> From<[&str; N]> for Targets {
    fn from(names: [&str; N]) -> Self {
        Modules::Names(names.map(String::from).to_vec()).into()
    }
}

impl Serialize for Modules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Names(names) => names.serialize(serializer),
            Self::Pattern(pattern) => pattern.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Modules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Modules;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of names or a pattern")
            }

            fn visit_str<E>(self, text: &str) -> Result<Modules, E> {
                Ok(Modules::Pattern(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, names: A) -> Result<Modules, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(names)).map(Modules::Names)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// The long form of [`Targets`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    modules: Modules,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exclude: Option<Modules>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blocks: Option<Vec<usize>>,
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { modules, exclude, blocks } = self.clone();
        if exclude.is_none() && blocks.is_none() {
            return modules.serialize(serializer);
        }
        Rule { modules, exclude, blocks }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = Targets;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of names, a pattern, or a map with the key `modules`")
            }

            fn visit_str<E>(self, text: &str) -> Result<Targets, E> {
                Ok(Modules::Pattern(text.to_owned()).into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, names: A) -> Result<Targets, A::Error> {
                let names = Vec::deserialize(SeqAccessDeserializer::new(names))?;
                Ok(Modules::Names(names).into())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Targets, A::Error> {
                let rule = Rule::deserialize(MapAccessDeserializer::new(map))?;
                let Rule { modules, exclude, blocks } = rule;
                Ok(Targets { modules, exclude, blocks })
            }
        }
        deserializer.deserialize_any(Form)
    }
}
