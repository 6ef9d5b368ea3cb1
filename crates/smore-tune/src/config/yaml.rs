//! From YAML text to a configuration, with the line of whatever is wrong.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, IgnoredAny, IntoDeserializer, MapAccess, Visitor,
};
use serde::{Deserialize, Deserializer};

use super::foreign::advice;
use super::{AdapterConfig, AdapterSection, DataConfig, RunConfig, TrainConfig, config_error};
use crate::error::{Result, nearest};
use crate::routing::health::HealthConfig;

/// The names of [`AdapterConfig`]'s kinds.
const ADAPTER_KINDS: [&str; 6] = ["smore", "lora", "hydra_lora", "mix_lora", "saved", "full"];

/// Calls `$parse` with the variant of [`AdapterConfig`] that `$kind` names: the kind decides which
/// keys an adapter section may have. Serde's own tagged enums buffer the section first and lose the
/// line numbers, so the kind is read ahead.
macro_rules! by_kind {
    ($kind:expr, $name:expr, |$variant:ident| $parse:expr) => {
        match $kind {
            "smore" => (|$variant: fn(_) -> _| $parse)(AdapterConfig::Smore),
            "lora" => (|$variant: fn(_) -> _| $parse)(AdapterConfig::Lora),
            "hydra_lora" => (|$variant: fn(_) -> _| $parse)(AdapterConfig::HydraLora),
            "mix_lora" => (|$variant: fn(_) -> _| $parse)(AdapterConfig::MixLora),
            "saved" => (|$variant: fn(_) -> _| $parse)(AdapterConfig::Saved),
            "full" => (|$variant: fn(_) -> _| $parse)(AdapterConfig::Full),
            other => {
                let known = ADAPTER_KINDS.join(", ");
                let hint = did_you_mean(other, ADAPTER_KINDS);
                let message = format!("adapter.kind is `{other}`; expected one of {known}{hint}");
                Err(config_error($name, message))
            }
        }
    };
}

/// Parses a configuration without checking its values.
pub(super) fn parse(text: &str, name: &str) -> Result<RunConfig> {
    let probe: KindProbe = from_yaml(text, name)?;
    by_kind!(probe.adapter.kind.as_str(), name, |variant| {
        Ok(RawConfig::parse(text, name)?.with(variant))
    })
}

/// Parses the adapter section of a configuration that may lack all others, or a section by itself.
pub(super) fn parse_section(text: &str, name: &str) -> Result<AdapterSection> {
    let probe: SectionProbe = from_yaml(text, name)?;
    if let Some(Kind { kind }) = probe.adapter {
        return by_kind!(kind.as_str(), name, |variant| {
            let partial: PartialConfig<_> = from_yaml(text, name)?;
            Ok(AdapterSection { adapter: variant(partial.adapter), model: partial.model })
        });
    }
    let kind = probe.kind.ok_or_else(|| config_error(name, "key `kind` is missing"))?;
    by_kind!(kind.as_str(), name, |variant| {
        let Bare(adapter) = from_yaml(text, name)?;
        Ok(AdapterSection { adapter: variant(adapter), model: None })
    })
}

/// The adapter's kind and nothing else.
#[derive(Deserialize)]
struct KindProbe {
    adapter: Kind,
}

/// The kind in a configuration or in an adapter section.
#[derive(Deserialize)]
struct SectionProbe {
    adapter: Option<Kind>,
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Kind {
    kind: String,
}

/// A configuration of which only the adapter must be there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, bound = "A: DeserializeOwned")]
struct PartialConfig<A> {
    model: Option<PathBuf>,
    #[serde(deserialize_with = "without_kind")]
    adapter: A,
    #[serde(rename = "data")]
    _data: Option<IgnoredAny>,
    #[serde(rename = "train")]
    _train: Option<IgnoredAny>,
    #[serde(rename = "health")]
    _health: Option<IgnoredAny>,
    #[serde(rename = "output_dir")]
    _output_dir: Option<IgnoredAny>,
}

/// An adapter section by itself.
struct Bare<A>(A);

impl<'de, A: Deserialize<'de>> Deserialize<'de> for Bare<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        without_kind(deserializer).map(Self)
    }
}

/// A configuration whose adapter section is known to be an `A`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, bound = "A: DeserializeOwned")]
struct RawConfig<A> {
    model: PathBuf,
    #[serde(deserialize_with = "without_kind")]
    adapter: A,
    data: DataConfig,
    #[serde(default)]
    train: TrainConfig,
    #[serde(default)]
    health: HealthConfig,
    output_dir: PathBuf,
}

impl<A: DeserializeOwned> RawConfig<A> {
    fn parse(text: &str, name: &str) -> Result<Self> {
        from_yaml(text, name)
    }

    fn with(self, adapter: impl Fn(A) -> AdapterConfig) -> RunConfig {
        RunConfig {
            model: self.model,
            adapter: adapter(self.adapter),
            data: self.data,
            train: self.train,
            health: self.health,
            output_dir: self.output_dir,
        }
    }
}

/// Reads an `A` from a mapping that also holds `kind`.
fn without_kind<'de, D, A>(deserializer: D) -> std::result::Result<A, D::Error>
where
    D: Deserializer<'de>,
    A: Deserialize<'de>,
{
    struct Section<A>(PhantomData<A>);

    impl<'de, A: Deserialize<'de>> Visitor<'de> for Section<A> {
        type Value = A;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a mapping with `kind`")
        }

        fn visit_map<M: MapAccess<'de>>(self, map: M) -> std::result::Result<A, M::Error> {
            A::deserialize(MapAccessDeserializer::new(SkipKind(map)))
        }
    }

    deserializer.deserialize_map(Section(PhantomData))
}

/// A mapping without its `kind` entry.
struct SkipKind<M>(M);

impl<'de, M: MapAccess<'de>> MapAccess<'de> for SkipKind<M> {
    type Error = M::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> std::result::Result<Option<K::Value>, M::Error> {
        loop {
            match self.0.next_key::<String>()? {
                None => return Ok(None),
                Some(key) if key == "kind" => {
                    self.0.next_value::<IgnoredAny>()?;
                }
                Some(key) => return seed.deserialize(key.into_deserializer()).map(Some),
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> std::result::Result<V::Value, M::Error> {
        self.0.next_value_seed(seed)
    }
}

/// Parses YAML; an unknown key gets its line and the nearest known key.
pub(crate) fn from_yaml<T: DeserializeOwned>(text: &str, name: &str) -> Result<T> {
    let says = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    if !text.lines().any(says) {
        return Err(config_error(name, "empty; expected keys and values"));
    }
    if text.contains('\0') {
        return Err(config_error(name, "holds NUL characters; expected YAML saved as UTF-8"));
    }
    serde_saphyr::from_str(text).map_err(|error| {
        let error = error.without_snippet();
        let (mut place, mut got) = (String::new(), "");
        if let Some(at) = error.location().filter(|at| at.line() > 0) {
            place = format!("line {}, column {}: ", at.line(), at.column());
            let line = text.lines().nth(at.line() as usize - 1).unwrap_or_default();
            if line[..line.len() - line.trim_start().len()].contains('\t') {
                return config_error(name, format!("{place}indented by a tab; expected spaces"));
            }
            got = value_at(text, at.line() as usize - 1, (at.column() as usize).saturating_sub(1));
        }
        config_error(name, format!("{place}{}", describe(error, got)))
    })
}

/// The plain value that starts at a place counted from 0, as it is written.
fn value_at(text: &str, line: usize, column: usize) -> &str {
    let line = text.lines().nth(line).unwrap_or_default();
    let start = line.char_indices().nth(column).map_or(line.len(), |(at, _)| at);
    let rest = &line[start..];
    rest.split([',', '}', ']', '#']).next().unwrap_or_default().trim()
}

/// The message of a YAML error, without its place.
fn describe(error: &serde_saphyr::Error, got: &str) -> String {
    use serde_saphyr::Error as Yaml;
    match error {
        Yaml::SerdeUnknownField { field, expected, .. } => {
            if let Some(advice) = advice(field) {
                return format!("key `{field}` does not exist here: {advice}");
            }
            let hint = did_you_mean(field, expected.iter().copied());
            format!("unknown key `{field}`; expected one of {}{hint}", expected.join(", "))
        }
        Yaml::SerdeUnknownVariant { variant, expected, .. } => {
            let hint = did_you_mean(variant, expected.iter().copied());
            format!("unknown value `{variant}`; expected one of {}{hint}", expected.join(", "))
        }
        Yaml::SerdeMissingField { field, .. } => format!("key `{field}` is missing"),
        Yaml::DuplicateMappingKey { key: Some(key), .. } => format!("key `{key}` is given twice"),
        Yaml::InvalidScalar { ty, .. } => {
            let expected = match *ty {
                ty if ty.contains("float") || ty.starts_with('f') => "a number",
                "bool" | "boolean" => "true or false",
                ty if ty.starts_with(['u', 'i']) => "a whole number",
                ty => ty,
            };
            format!("value is `{got}`; expected {expected}")
        }
        Yaml::NonFiniteFloat { value, .. } => format!("`{value}` is not a finite number"),
        other => {
            let text = other.to_string();
            let place = text.rfind(" at line ").unwrap_or(text.len());
            match &text[..place] {
                "expected mapping start" => "expected a mapping, that is lines `key: value`".into(),
                "expected string scalar" => {
                    "expected a single value, found a list or a mapping".into()
                }
                other => other.to_owned(),
            }
        }
    }
}

/// `; did you mean ...?`, or nothing.
fn did_you_mean<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(given, known).map_or_else(String::new, |key| format!("; did you mean `{key}`?"))
}
