//! A validated adapter with every number that follows from what the user wrote.

use crate::config::{
    Activation, ActivationPosition, GateConfig, GateKind, Init, LayerConfig, RouterArchitecture,
    SmoreConfig, Structure,
};
use crate::{Error, Result};

mod baselines;

pub use baselines::{FfnShape, HydraLoraSpec, LoraSpec, MixLoraSpec};

/// Layers above this make trees no machine holds.
const MAX_LAYERS: usize = 16;
/// Expert indices are 16 bits wide.
const MAX_EXPERTS: usize = u16::MAX as usize;
/// Tree nodes of one token.
const MAX_NODES: usize = 1 << 16;
/// Parameters of one adapter on one linear map.
const MAX_PARAMETERS: usize = 1 << 36;

/// S'MoRE on one linear map `[d_out, d_in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct SmoreSpec {
    /// Inputs of the adapted linear map.
    pub d_in: usize,
    /// Outputs of the adapted linear map.
    pub d_out: usize,
    /// The layers, leaves first.
    pub layers: Vec<LayerSpec>,
    /// The gate.
    pub gate: GateSpec,
    /// sigma.
    pub activation: Activation,
    /// Where sigma stands.
    pub position: ActivationPosition,
    /// S'MoRE#: the layers share A and B.
    pub shared_pool: bool,
    /// What the layers form.
    pub structure: Structure,
    /// How the parameters start.
    pub init: Init,
}

/// One S'MoRE layer l.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSpec {
    /// s_l
    pub experts: usize,
    /// f_l; s_l for the dense gate
    pub fanout: usize,
    /// r_l
    pub rank: usize,
    /// scale_l = lora_alpha / r_l, or 1
    pub scale: f64,
    /// d_l, width of what comes from below; 0 at the leaves
    pub width_below: usize,
    /// d_{l+1}, width of this layer's output
    pub width: usize,
    /// F_l, active nodes of this layer
    pub nodes: usize,
    /// F_{l+1}, their parents; 1 at the top
    pub parents: usize,
    /// First column of this layer's down projections A x in the stacked projection
    pub stack_start: usize,
    /// m, width of the router's network
    pub router_width: usize,
    /// Width of the router's input: the token's view and the keys of all ancestors
    pub router_input: usize,
    /// Length of this layer's keys
    pub key_width: usize,
}

/// The gate of every layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateSpec {
    /// Which gate.
    pub kind: GateKind,
    /// Network or keys alone.
    pub architecture: RouterArchitecture,
    /// Activation inside the network.
    pub activation: Activation,
    /// w, weight of the balance loss.
    pub balance_weight: f64,
    /// d_down, width of the router's view of the token.
    pub input_width: usize,
    /// The router sees the keys of ancestors.
    pub ancestor_keys: bool,
}

impl SmoreSpec {
    /// Validates a config for a linear map `[d_out, d_in]`.
    ///
    /// # Errors
    /// Names the key, its value, what was expected and what to do.
    pub fn new(config: &SmoreConfig, d_in: usize, d_out: usize) -> Result<Self> {
        let widths = vec![config.gate.router_width; config.layers.len()];
        let spec = Self::with_router_widths(config, &widths, d_in, d_out)?;
        spec.check_threshold(config)?;
        Ok(spec)
    }

    /// The noisy gate's threshold is the best score that was not chosen.
    fn check_threshold(&self, config: &SmoreConfig) -> Result<()> {
        let noisy = self.gate.kind == GateKind::NoisyTopk;
        let mut layers = self.layers.iter().zip(&config.layers).enumerate();
        let Some((l, (layer, written))) = layers.find(|(_, (l, _))| noisy && l.fanout == l.experts)
        else {
            return Ok(());
        };
        let chosen = if written.fanout == layer.fanout {
            format!("layers[{l}].fanout is {} and so is layers[{l}].experts", layer.fanout)
        } else {
            format!(
                "structure is multi_order, where layers[{l}].fanout {} and those above it make a \
                 token choose all {} of layers[{l}].experts",
                written.fanout, layer.experts
            )
        };
        Err(Error::config(format!(
            "{chosen}; the noisy_topk gate needs an expert left over to set its threshold: lower \
             fanout, or use gate.kind switch or dense"
        )))
    }

    /// As [`SmoreSpec::new`], with a router width for every layer, and allowing what can be run
    /// though not trained (a noisy gate with f = s): what adapter files may hold.
    ///
    /// # Errors
    /// As [`SmoreSpec::new`].
    pub fn with_router_widths(
        config: &SmoreConfig,
        router_widths: &[usize],
        d_in: usize,
        d_out: usize,
    ) -> Result<Self> {
        check_layers(config)?;
        check_gate(&config.gate, router_widths, config.layers.len())?;
        check_activations(config)?;
        check_structure(config)?;
        if d_in == 0 || d_out == 0 {
            return Err(Error::config(format!(
                "the linear map is {d_out} x {d_in}; nothing to adapt"
            )));
        }
        let mut gate = GateSpec {
            kind: config.gate.kind,
            architecture: config.gate.architecture,
            activation: config.gate.activation,
            balance_weight: config.gate.balance_weight,
            input_width: config.gate.router_input_width,
            // Without a tree there are no ancestors, and from below they are not yet known.
            ancestor_keys: config.gate.ancestor_keys
                && config.structure == Structure::Tree
                && config.gate.architecture != RouterArchitecture::BottomUp,
        };
        if gate.input_width == 0 {
            gate.input_width = d_in;
        }
        if gate.kind == GateKind::NoisyTopk {
            // The authors' noisy gate has no linear form: it always asks the network.
            gate.architecture = RouterArchitecture::Mlp;
        }
        let spec = Self {
            d_in,
            d_out,
            layers: derive_layers(config, router_widths, &gate)?,
            gate,
            activation: config.activation,
            position: config.activation_position,
            shared_pool: config.shared_pool,
            structure: config.structure,
            init: config.init,
        };
        spec.check_size()?;
        Ok(spec)
    }

    /// True where node i of a layer takes row i of the layer below's output.
    pub fn is_tree(&self) -> bool {
        self.structure != Structure::MultiOrder && !self.bottom_up()
    }

    /// True where routing runs from the leaves to the root.
    pub fn bottom_up(&self) -> bool {
        self.gate.architecture == RouterArchitecture::BottomUp
    }

    /// L
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// d_L, width of the root's embedding.
    pub fn root_width(&self) -> usize {
        self.layers[self.depth() - 1].width
    }

    /// Rows of all down factors together: where the router's view starts in the stacked projection.
    pub fn stacked_ranks(&self) -> usize {
        let own = |l: &LayerSpec| l.experts * l.rank;
        if self.shared_pool { own(&self.layers[0]) } else { self.layers.iter().map(own).sum() }
    }

    /// Columns of the stacked projection: all A x, then the router's view D x.
    pub fn stack_width(&self) -> usize {
        self.stacked_ranks() + self.gate.input_width
    }

    fn check_size(&self) -> Result<()> {
        let wide = |a: usize, b: usize| a as u128 * b as u128;
        let mut total = wide(self.stack_width(), self.d_in) + wide(self.d_out, self.root_width());
        for l in &self.layers {
            total += wide(l.width, l.width) + wide(l.router_width, l.router_input);
            let keys = if self.bottom_up() { l.parents } else { 1 } * l.experts;
            total += wide(keys, l.key_width) + wide(l.experts, l.router_input);
        }
        if total > MAX_PARAMETERS as u128 {
            return Err(Error::config(format!(
                "the adapter would have more than 2^36 parameters on one {} x {} map; lower rank, \
                 experts or the number of layers",
                self.d_out, self.d_in
            )));
        }
        Ok(())
    }
}

fn check_layers(config: &SmoreConfig) -> Result<()> {
    let layers = &config.layers;
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(Error::config(format!(
            "layers has {} entries; expected 1 to {MAX_LAYERS}, leaves first",
            layers.len()
        )));
    }
    for (l, layer) in layers.iter().enumerate() {
        let LayerConfig { experts, fanout, rank, lora_alpha } = *layer;
        for (key, value) in [("experts", experts), ("fanout", fanout), ("rank", rank)] {
            if value == 0 || value > MAX_EXPERTS {
                return Err(Error::config(format!(
                    "layers[{l}].{key} is {value}; expected 1 to {MAX_EXPERTS}"
                )));
            }
        }
        if fanout > experts {
            return Err(Error::config(format!(
                "layers[{l}].fanout is {fanout} but layers[{l}].experts is {experts}; fanout must \
                 be at most experts"
            )));
        }
        if lora_alpha.is_some_and(|a| !a.is_finite() || a <= 0.0) {
            return Err(Error::config(format!(
                "layers[{l}].lora_alpha is {}; expected a positive number",
                lora_alpha.unwrap_or_default()
            )));
        }
        if config.shared_pool && (experts, rank) != (layers[0].experts, layers[0].rank) {
            return Err(Error::config(format!(
                "shared_pool needs equal layers, but layers[{l}] has {experts} experts of rank \
                 {rank} and layers[0] has {} of rank {}; make them equal or turn shared_pool off",
                layers[0].experts, layers[0].rank
            )));
        }
    }
    Ok(())
}

fn check_gate(gate: &GateConfig, router_widths: &[usize], depth: usize) -> Result<()> {
    if router_widths.len() != depth {
        return Err(Error::config(format!(
            "{} router widths for {depth} layers; expected one for each",
            router_widths.len()
        )));
    }
    if let Some(&m) = router_widths.iter().find(|&&m| m == 0 || m > MAX_EXPERTS) {
        return Err(Error::config(format!(
            "gate.router_width is {m}; expected 1 to {MAX_EXPERTS}"
        )));
    }
    if gate.router_input_width > 1 << 20 {
        return Err(Error::config(format!(
            "gate.router_input_width is {}; expected at most {} (0 means the input's own width)",
            gate.router_input_width,
            1 << 20
        )));
    }
    if !(gate.balance_weight.is_finite() && gate.balance_weight >= 0.0) {
        return Err(Error::config(format!(
            "gate.balance_weight is {}; expected a number that is not negative",
            gate.balance_weight
        )));
    }
    Ok(())
}

fn check_activations(config: &SmoreConfig) -> Result<()> {
    for (key, activation) in
        [("activation", config.activation), ("gate.activation", config.gate.activation)]
    {
        if let Activation::Prelu(slope) = activation
            && !slope.is_finite()
        {
            return Err(Error::config(format!(
                "{key} starts at the slope {slope}; expected a number"
            )));
        }
    }
    Ok(())
}

fn check_structure(config: &SmoreConfig) -> Result<()> {
    let linear = config.activation == Activation::Identity;
    let bottom_up = config.gate.architecture == RouterArchitecture::BottomUp;
    let name = match config.structure {
        Structure::Tree => "tree",
        Structure::MultiOrder => "multi_order",
        Structure::Flat => "flat",
    };
    if config.structure != Structure::Tree && !linear {
        return Err(Error::config(format!(
            "structure is {name}, which has no non-linearity between layers; set activation: \
             identity"
        )));
    }
    if config.structure == Structure::Flat && config.layers.len() != 1 {
        return Err(Error::config(format!(
            "structure is flat but layers has {} entries; a flat mixture has one",
            config.layers.len()
        )));
    }
    if bottom_up && config.gate.kind != GateKind::Switch {
        return Err(Error::config(
            "gate.architecture is bottom_up, which works with gate.kind switch only",
        ));
    }
    if bottom_up && config.structure == Structure::MultiOrder {
        return Err(Error::config(
            "gate.architecture is bottom_up, which needs positions in a tree; structure is \
             multi_order",
        ));
    }
    for (l, layer) in config.layers.iter().enumerate().filter(|_| bottom_up) {
        if layer.experts * layer.fanout > MAX_EXPERTS {
            return Err(Error::config(format!(
                "layers[{l}] has {} experts for each of {} positions; bottom_up ranks at most \
                 {MAX_EXPERTS} pairs",
                layer.experts, layer.fanout
            )));
        }
    }
    Ok(())
}

fn derive_layers(
    config: &SmoreConfig,
    router_widths: &[usize],
    gate: &GateSpec,
) -> Result<Vec<LayerSpec>> {
    let mut layers: Vec<LayerSpec> = Vec::with_capacity(config.layers.len());
    let (mut below, mut stack_start) = (0, 0);
    for (layer, &router_width) in config.layers.iter().zip(router_widths) {
        let LayerConfig { experts, fanout, rank, lora_alpha } = *layer;
        let own = experts * rank;
        let width = if config.shared_pool { own } else { below + own };
        layers.push(LayerSpec {
            experts,
            fanout: if gate.kind == GateKind::Dense { experts } else { fanout },
            rank,
            scale: lora_alpha.map_or(1.0, |a| a / rank as f64),
            width_below: below,
            width,
            nodes: 0,
            parents: 0,
            stack_start,
            router_width,
            router_input: 0,
            key_width: 0,
        });
        below = width;
        stack_start += if config.shared_pool { 0 } else { own };
    }
    let (mut parents, mut router_input) = (1usize, gate.input_width);
    let mut in_tree = 1usize;
    for (l, layer) in layers.iter_mut().enumerate().rev() {
        if config.structure == Structure::MultiOrder {
            in_tree = in_tree.saturating_mul(layer.fanout);
            layer.fanout = in_tree.min(layer.experts);
            parents = 1;
        }
        layer.parents = parents;
        layer.nodes = parents * layer.fanout;
        if layer.nodes > MAX_NODES {
            return Err(Error::config(format!(
                "layers[{l}] would have {} nodes in every token's tree; at most {MAX_NODES}: \
                 lower the fanouts or the number of layers",
                layer.nodes
            )));
        }
        if router_input > 1 << 24 {
            return Err(Error::config(format!(
                "the router of layers[{l}] would look at {router_input} numbers; lower \
                 gate.router_input_width, use gate.architecture mlp or fewer layers"
            )));
        }
        layer.router_input = router_input;
        layer.key_width = match gate.architecture {
            RouterArchitecture::Mlp => layer.router_width,
            RouterArchitecture::Linear => router_input,
            RouterArchitecture::BottomUp => gate.input_width,
        };
        if gate.architecture == RouterArchitecture::BottomUp {
            layer.router_input = layer.width_below + gate.input_width;
        }
        parents = layer.nodes;
        if gate.ancestor_keys {
            router_input += layer.key_width;
        }
    }
    Ok(layers)
}
