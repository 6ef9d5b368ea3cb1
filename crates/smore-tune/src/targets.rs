//! Which linear maps of a decoder an adapter sits on: PEFT's rules for `target_modules`,
//! `exclude_modules`, `layers_to_transform`, `rank_pattern` and `alpha_pattern`, over the module
//! paths of transformers.

use crate::error::nearest;
use crate::model::spec::Proj;
use fancy_regex::Regex;
use indexmap::IndexMap;
use smore::targets::{Modules, Targets};

type Resolved<T> = std::result::Result<T, String>;

/// What to do with a name that fits no module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// An error: the user made a slip.
    Refuse,
    /// Nothing, as PEFT does: adapter files list names of other models too.
    Pass,
}

/// The linear maps that `targets` choose in a decoder of `blocks` blocks, in order of block and
/// [`Proj`].
///
/// # Errors
/// A name or pattern that fits nothing, a broken pattern, a block that does not exist, or a choice
/// of the token table or the output head, which cannot be adapted.
pub fn resolve(targets: &Targets, blocks: usize, unknown: Unknown) -> Resolved<Vec<(usize, Proj)>> {
    let rule = Rule::new(targets)?;
    for path in ["model.embed_tokens", "lm_head"] {
        if rule.chooses(path)? {
            return Err(format!(
                "targets choose `{path}`, which cannot be adapted; only the linear maps of blocks \
                 can"
            ));
        }
    }
    if let Some(&block) = targets.blocks.iter().flatten().find(|&&b| b >= blocks) {
        return Err(format!("targets.blocks names {block}, but the model has {blocks}"));
    }
    let maps = (0..blocks).flat_map(|block| Proj::ALL.map(|proj| (block, proj)));
    let mut chosen = Vec::new();
    for (block, proj) in maps {
        let in_blocks = targets.blocks.as_ref().is_none_or(|blocks| blocks.contains(&block));
        if in_blocks && rule.chooses(&proj.path(block))? {
            chosen.push((block, proj));
        }
    }
    if unknown == Unknown::Refuse
        && let Modules::Names(names) = &targets.modules
    {
        check_names(names, blocks)?;
    }
    if chosen.is_empty() {
        let modules = serde_json::to_string(targets).unwrap_or_default();
        return Err(format!(
            "targets {modules} choose no linear map; name some of {}, or a pattern for whole paths \
             such as {}",
            Proj::ALL.map(Proj::name).join(", "),
            Proj::Gate.path(0)
        ));
    }
    Ok(chosen)
}

/// Every name must fit a map.
fn check_names(names: &[String], blocks: usize) -> Resolved<()> {
    let fits = |name: &str| {
        let mut maps = (0..blocks).flat_map(|b| Proj::ALL.map(|p| p.path(b)));
        maps.any(|path| is_named(&path, name))
    };
    match names.iter().find(|name| !fits(name)) {
        None => Ok(()),
        Some(name) => {
            let known = Proj::ALL.map(Proj::name);
            let hint =
                nearest(name, known).map_or_else(String::new, |n| format!("; did you mean `{n}`?"));
            Err(format!("targets name `{name}`; expected some of {}{hint}", known.join(", ")))
        }
    }
}

/// [`Targets`] with their patterns compiled.
struct Rule {
    modules: Choice,
    exclude: Option<Choice>,
}

enum Choice {
    AllLinear,
    Names(Vec<String>),
    Pattern(Regex),
}

impl Rule {
    fn new(targets: &Targets) -> Resolved<Self> {
        let choice = |modules: &Modules| match modules {
            Modules::Pattern(p) if p == "all-linear" => Ok(Choice::AllLinear),
            Modules::Pattern(p) => full_match(p).map(Choice::Pattern),
            Modules::Names(names) => Ok(Choice::Names(names.clone())),
        };
        let exclude = targets.exclude.as_ref().map(choice).transpose()?;
        Ok(Self { modules: choice(&targets.modules)?, exclude })
    }

    fn chooses(&self, path: &str) -> Resolved<bool> {
        let excluded = self.exclude.as_ref().map_or(Ok(false), |c| c.fits(path))?;
        Ok(!excluded && self.modules.fits(path)?)
    }
}

impl Choice {
    fn fits(&self, path: &str) -> Resolved<bool> {
        match self {
            Self::AllLinear => Ok(path.starts_with("model.layers.")),
            Self::Names(names) => Ok(names.iter().any(|name| is_named(path, name))),
            Self::Pattern(regex) => regex.is_match(path).map_err(|e| failed(regex.as_str(), &e)),
        }
    }
}

fn is_named(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// Python's `re.fullmatch`.
fn full_match(pattern: &str) -> Resolved<Regex> {
    Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(|e| failed(pattern, &e))
}

fn failed(pattern: &str, error: &fancy_regex::Error) -> String {
    format!("the pattern `{pattern}` cannot be used: {error}")
}

/// The value of the first key that fits the end of `path`, as in PEFT's `rank_pattern`.
///
/// # Errors
/// A broken pattern.
pub fn pattern_value<T: Copy>(patterns: &IndexMap<String, T>, path: &str) -> Resolved<Option<T>> {
    for (key, &value) in patterns {
        let regex = Regex::new(&format!(r"\A(?:.*\.)?(?:{key})\z")).map_err(|e| failed(key, &e))?;
        if regex.is_match(path).map_err(|e| failed(key, &e))? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn chosen(targets: Value) -> Resolved<Vec<(usize, Proj)>> {
        resolve(&serde_json::from_value(targets).unwrap(), 12, Unknown::Refuse)
    }

    #[test]
    fn names_fit_whole_paths_and_their_ends() {
        let q = chosen(json!(["q_proj"])).unwrap();
        assert_eq!(q, (0..12).map(|b| (b, Proj::Q)).collect::<Vec<_>>());
        assert_eq!(chosen(json!(["self_attn.q_proj"])).unwrap(), q);
        assert_eq!(chosen(json!(["model.layers.3.mlp.up_proj"])).unwrap(), [(3, Proj::Up)]);
        // `1.mlp.up_proj` ends block 1's path, not block 11's.
        assert_eq!(chosen(json!(["1.mlp.up_proj"])).unwrap(), [(1, Proj::Up)]);
    }

    #[test]
    fn patterns_fit_whole_paths_only() {
        assert_eq!(chosen(json!(r".*\.1\.mlp\.up_proj")).unwrap(), [(1, Proj::Up)]);
        assert!(chosen(json!("up_proj")).is_err());
        let ffn = chosen(json!(r"model\.layers\.\d+\.mlp\.(?!down).*")).unwrap();
        assert_eq!(ffn.len(), 24);
        assert_eq!(chosen(json!("all-linear")).unwrap().len(), 84);
        assert_eq!(
            chosen(json!(".*layers.0.mlp.up_proj|.*layers.0.mlp.gate_proj")).unwrap().len(),
            2
        );
    }

    #[test]
    fn exclusions_and_blocks_narrow_the_choice() {
        let some = json!({"modules": "all-linear", "exclude": [ "mlp.up_proj", "q_proj" ],
            "blocks": [2, 5]});
        let some = chosen(some).unwrap();
        assert_eq!(some.len(), 10);
        assert!(
            some.iter().all(|&(b, p)| [2, 5].contains(&b) && ![Proj::Q, Proj::Up].contains(&p))
        );
    }

    #[test]
    fn slips_are_named() {
        for (targets, word) in [
            (json!(["gate_prj"]), "did you mean `gate_proj`?"),
            (json!([]), "choose no linear map"),
            (json!("("), "cannot be used"),
            (json!(["q_proj", "lm_head"]), "lm_head"),
            (json!(".*embed.*"), "embed_tokens"),
            (json!({"modules": ["q_proj"], "blocks": [12]}), "12"),
        ] {
            let error = chosen(targets.clone()).unwrap_err();
            assert!(error.contains(word), "{targets}: {error}");
        }
        let names = serde_json::from_value(json!(["q_proj", "c_attn"])).unwrap();
        assert_eq!(resolve(&names, 12, Unknown::Pass).unwrap().len(), 12);
    }

    #[test]
    fn the_first_pattern_that_fits_decides() {
        let patterns = IndexMap::from([
            (r"layers\.1\.mlp\.up_proj".to_owned(), 1),
            ("up_proj".to_owned(), 2),
            (r"0.*\.up_proj".to_owned(), 3),
        ]);
        let value = |block, proj: Proj| pattern_value(&patterns, &proj.path(block)).unwrap();
        assert_eq!(value(1, Proj::Up), Some(1));
        assert_eq!(value(0, Proj::Up), Some(2));
        assert_eq!(value(0, Proj::Down), None);
    }
}
