//! What a layer case recorded, computed here.

use super::Precision;
use super::case::{LayerCase, Tensor, Tensors, data_error};
use crate::error::Result;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use smore::adapter::SmoreSaved;
use smore::config::GateKind;
use smore::kernel::{GateNoise, Pass, hidden_states};
use smore_engine::{Cpu, Float, View, ViewMut};
use std::path::Path;

/// Everything the computation reads, checked.
struct Inputs<T> {
    /// Tokens.
    n: usize,
    params: Vec<T>,
    /// `[n, d_in]`
    x: Vec<T>,
    /// `[n, d_out]`; absent where the recording took no gradient of an output
    g: Option<Vec<T>>,
    /// `[d_out, d_in]`
    base: Vec<T>,
    bias: Option<Vec<T>>,
    valid: Option<Vec<bool>>,
    noise: Option<GateNoise<T>>,
}

/// A backward pass's results.
struct Gradients<T> {
    params: Vec<T>,
    /// By the adapter's input, `[n, d_in]`.
    x: Vec<T>,
}

impl LayerCase {
    /// Computes in `T` everything that a case may record, under its names.
    ///
    /// # Errors
    /// Names a tensor that is missing or has the wrong shape.
    pub fn compute<T: Float>(&self) -> Result<Tensors> {
        let (smore, spec) = (&self.smore, &self.smore.spec);
        let inputs = self.inputs::<T>()?;
        let (valid, noise) = (inputs.valid.as_deref(), inputs.noise.as_ref());
        let mut adapted = vec![T::ZERO; inputs.n * spec.d_out];
        let target = ViewMut::new(&mut adapted, inputs.n * spec.d_out);
        let (params, x) = (whole(&inputs.params), whole(&inputs.x));
        let saved = smore.forward_with(&Cpu::new(), valid, noise, None, params, x, target);
        let y = self.sum(&self.base_output(&inputs), &adapted);
        let mut out = Tensors::new();
        self.put_routing(&inputs, &saved, &mut out);
        self.put_losses(&inputs, &saved, &y, &mut out);
        let mut shape = self.tensor("x")?.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = spec.d_out;
        }
        out.insert("y".into(), Tensor { shape, values: to_f64(&y) });
        self.put_gradients(&inputs, &saved, &mut out)?;
        // As recorded, where a dimension of size 1 was written or left out.
        for (name, tensor) in &mut out {
            if let Some(recorded) = self.tensors.get(name) {
                self.check_shape(name, &recorded.shape, &tensor.shape)?;
                tensor.shape.clone_from(&recorded.shape);
            }
        }
        Ok(out)
    }

    fn inputs<T: Float>(&self) -> Result<Inputs<T>> {
        let spec = &self.smore.spec;
        let x = self.tensor("x")?;
        if x.values.is_empty() || x.shape.last() != Some(&spec.d_in) {
            let (shape, d_in) = (&x.shape, spec.d_in);
            return Err(self.error(format!("`x` has shape {shape:?}; expected [.., {d_in}]")));
        }
        let tokens = &x.shape[..x.shape.len() - 1];
        let n = tokens.iter().product();
        let params = self.params()?;
        let needs_g = |name: &String| name.starts_with("grad.") || name.starts_with("loss");
        let g = if self.tensors.contains_key("g") || self.tensors.keys().any(needs_g) {
            Some(from_f64(self.shaped("g", &[tokens, &[spec.d_out]].concat())?))
        } else {
            None
        };
        let bias = if self.biased.unwrap_or(self.tensors.contains_key("base.bias")) {
            Some(from_f64(self.shaped("base.bias", &[spec.d_out])?))
        } else {
            None
        };
        let masked = self.masked.unwrap_or(self.tensors.contains_key("attention_mask"));
        let valid = if masked {
            let mask = self.shaped("attention_mask", tokens)?;
            Some(mask.iter().map(|&m| m != 0.0).collect())
        } else {
            None
        };
        Ok(Inputs {
            n,
            params,
            x: from_f64(&x.values),
            g,
            base: from_f64(self.shaped("base.weight", &[spec.d_out, spec.d_in])?),
            bias,
            valid,
            noise: self.noise(n)?,
        })
    }

    fn params<T: Float>(&self) -> Result<Vec<T>> {
        let layout = &self.smore.layout;
        // All shapes first: a wrong setting must not claim memory that no file backs.
        let tensors = layout
            .params
            .iter()
            .map(|p| self.shaped(&format!("param.{}", p.name), &p.shape))
            .collect::<Result<Vec<_>>>()?;
        let mut params = vec![T::ZERO; layout.len];
        for (param, values) in layout.params.iter().zip(tensors) {
            // Autocast gives factors of products in bf16.
            let factor = self.precision == Precision::Autocast && param.shape.len() > 1;
            for (to, &value) in params[param.range()].iter_mut().zip(values) {
                *to = T::from_f64(if factor { to_bf16(value) } else { value });
            }
        }
        Ok(params)
    }

    /// The recorded noise of a noisy gate in training.
    fn noise<T: Float>(&self, n: usize) -> Result<Option<GateNoise<T>>> {
        let spec = &self.smore.spec;
        let train = self.train.unwrap_or(self.tensors.contains_key("noise.0"));
        if !train || spec.gate.kind != GateKind::NoisyTopk {
            return Ok(None);
        }
        let layers = (0..spec.depth())
            .map(|l| {
                let shape = self.per_parent(n, l, spec.layers[l].experts);
                Ok(from_f64(self.shaped(&format!("noise.{l}"), &shape)?))
            })
            .collect::<Result<_>>()?;
        Ok(Some(GateNoise { layers }))
    }

    /// `[n, f_{L-1}, .., f_{l+1}, width]`
    fn per_parent(&self, n: usize, l: usize, width: usize) -> Vec<usize> {
        let above = self.smore.spec.layers[l + 1..].iter().rev().map(|layer| layer.fanout);
        [n].into_iter().chain(above).chain([width]).collect()
    }

    /// Trees, hidden states and all that the gates report.
    fn put_routing<T: Float>(
        &self,
        inputs: &Inputs<T>,
        saved: &SmoreSaved<Cpu<T>>,
        out: &mut Tensors,
    ) {
        let (spec, layout, n) = (&self.smore.spec, &self.smore.layout, inputs.n);
        let (valid, noise) = (inputs.valid.as_deref(), inputs.noise.as_ref());
        let pass = Pass { spec, layout, valid, noise, removed: None };
        let routing = &saved.routing;
        let hidden = hidden_states(&pass, routing, &inputs.params, &saved.z);
        for (l, (layer, hidden)) in spec.layers.iter().zip(&hidden).enumerate() {
            let mut put = |name: &str, shape: Vec<usize>, values: Vec<f64>| {
                out.insert(format!("{name}.{l}"), Tensor { shape, values });
            };
            let (tree, nodes) = (&routing.tree.layers[l], self.per_parent(n, l, layer.fanout));
            let experts = tree.expert_idx.iter().map(|&i| f64::from(i)).collect();
            put("hidden", self.per_parent(n, l, layer.width), to_f64(hidden));
            put("topk_idx", nodes.clone(), experts);
            put("topk_score", nodes, to_f64(&tree.gate_weight));
            if spec.gate.kind == GateKind::Dense {
                continue;
            }
            put("layer_balance_loss", vec![], vec![routing.balance_losses[l]]);
            let (load, importance) = (format!("load.{l}"), format!("importance.{l}"));
            if self.tensors.contains_key(&load) {
                put("load", vec![layer.experts], routing.stats[l].load.clone());
            }
            let Some(importance) = self.tensors.get(&importance) else { continue };
            if spec.gate.kind == GateKind::NoisyTopk {
                put("importance", vec![layer.experts], routing.stats[l].importance.clone());
            } else if importance.values.len() == 1 {
                // The authors' switch gate has none and reports 0.
                put("importance", vec![], vec![0.0]);
            }
        }
    }

    fn put_losses<T: Float>(
        &self,
        inputs: &Inputs<T>,
        saved: &SmoreSaved<Cpu<T>>,
        y: &[T],
        out: &mut Tensors,
    ) {
        let mut put = |name: &str, value: f64| {
            out.insert(name.into(), Tensor { shape: vec![], values: vec![value] });
        };
        let balance: f64 = saved.routing.balance_losses.iter().sum();
        if self.smore.spec.gate.kind != GateKind::Dense {
            put("balance_loss", balance);
        }
        if let Some(g) = &inputs.g {
            let loss: f64 = y.iter().zip(g).map(|(y, g)| y.to_f64() * g.to_f64()).sum();
            put("loss_y", loss);
            put("loss", loss + balance);
        }
    }

    fn put_gradients<T: Float>(
        &self,
        inputs: &Inputs<T>,
        saved: &SmoreSaved<Cpu<T>>,
        out: &mut Tensors,
    ) -> Result<()> {
        let shape = &self.tensor("x")?.shape;
        if let Some(g) = &inputs.g {
            let grads = self.backward(inputs, saved, g);
            self.put_params("grad", &grads, out);
            let values = to_f64(&self.sum(&self.base_input_grad(inputs, g), &grads.x));
            out.insert("grad.x".into(), Tensor { shape: shape.clone(), values });
        }
        if self.smore.spec.gate.kind != GateKind::Dense {
            // Without a gradient from the output the balance loss's remains.
            let zero = vec![T::ZERO; inputs.n * self.smore.spec.d_out];
            let grads = self.backward(inputs, saved, &zero);
            self.put_params("balance_grad", &grads, out);
            let values = grads.x.iter().map(|&x| self.leave(x).to_f64()).collect();
            out.insert("balance_grad.x".into(), Tensor { shape: shape.clone(), values });
        }
        Ok(())
    }

    /// Every parameter's gradient; of the balance loss only those that it reaches.
    fn put_params<T: Float>(&self, prefix: &str, grads: &Gradients<T>, out: &mut Tensors) {
        for param in &self.smore.layout.params {
            let name = format!("{prefix}.{}", param.name);
            let router =
                param.name.starts_with("moe_gate") || param.name.starts_with("moe_downproj_x");
            if prefix == "grad" || router || self.tensors.contains_key(&name) {
                let values = to_f64(&grads.params[param.range()]);
                out.insert(name, Tensor { shape: param.shape.clone(), values });
            }
        }
    }

    fn backward<T: Float>(
        &self,
        inputs: &Inputs<T>,
        saved: &SmoreSaved<Cpu<T>>,
        g: &Vec<T>,
    ) -> Gradients<T> {
        let mut params = vec![T::ZERO; self.smore.layout.len];
        let mut x = vec![T::ZERO; inputs.x.len()];
        let mut saved = SmoreSaved { z: saved.z.clone(), routing: saved.routing.clone() };
        self.smore.backward_with(
            &Cpu::new(),
            inputs.valid.as_deref(),
            inputs.noise.as_ref(),
            None,
            1.0,
            whole(&inputs.params),
            &mut saved,
            whole(&inputs.x),
            whole(g),
            ViewMut::new(&mut params, self.smore.layout.len),
            Some(ViewMut::new(&mut x, inputs.x.len())),
        );
        Gradients { params, x }
    }

    /// What the base and the adapter give, each as it leaves its part, added there.
    fn sum<T: Float>(&self, base: &[T], adapter: &[T]) -> Vec<T> {
        base.iter().zip(adapter).map(|(&b, &a)| self.leave(self.leave(b) + self.leave(a))).collect()
    }

    /// A number as base and adapter hand it on: in bf16, except in an f32 case.
    fn leave<T: Float>(&self, x: T) -> T {
        match self.precision {
            Precision::F32 => x,
            Precision::Bf16 | Precision::Mixed | Precision::Autocast => {
                T::from_f64(to_bf16(x.to_f64()))
            }
        }
    }

    /// x W^T + b, summed in f64.
    fn base_output<T: Float>(&self, inputs: &Inputs<T>) -> Vec<T> {
        let d_in = self.smore.spec.d_in;
        let mut y = Vec::with_capacity(inputs.n * self.smore.spec.d_out);
        for x in inputs.x.chunks_exact(d_in) {
            for (o, w) in inputs.base.chunks_exact(d_in).enumerate() {
                let sum: f64 = x.iter().zip(w).map(|(x, w)| x.to_f64() * w.to_f64()).sum();
                let bias = inputs.bias.as_ref().map_or(0.0, |b| b[o].to_f64());
                y.push(T::from_f64(sum + bias));
            }
        }
        y
    }

    /// g W, summed in f64.
    fn base_input_grad<T: Float>(&self, inputs: &Inputs<T>, g: &[T]) -> Vec<T> {
        let (d_in, d_out) = (self.smore.spec.d_in, self.smore.spec.d_out);
        let mut dx = Vec::with_capacity(inputs.x.len());
        for g in g.chunks_exact(d_out) {
            for i in 0..d_in {
                let column = inputs.base[i..].iter().step_by(d_in);
                let sum: f64 = g.iter().zip(column).map(|(g, w)| g.to_f64() * w.to_f64()).sum();
                dx.push(T::from_f64(sum));
            }
        }
        dx
    }
}

/// Writes computed tensors as F32, tree indices and tokens as I64.
///
/// # Errors
/// If the file cannot be written.
pub fn write_tensors(tensors: &Tensors, path: &Path) -> Result<()> {
    let bytes: Vec<(Dtype, Vec<u8>)> = tensors
        .iter()
        .map(|(name, t)| {
            if name.starts_with("topk_idx.") || name.starts_with("generate.") {
                (Dtype::I64, t.values.iter().flat_map(|&x| (x as i64).to_le_bytes()).collect())
            } else {
                (Dtype::F32, t.values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect())
            }
        })
        .collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, t), (dtype, bytes))| {
            let view = TensorView::new(*dtype, t.shape.clone(), bytes);
            view.map(|v| (name, v)).map_err(|e| data_error(path, format!("`{name}`: {e}")))
        })
        .collect::<Result<Vec<_>>>()?;
    let file = safetensors::serialize(views, None)
        .map_err(|e| data_error(path, format!("cannot be written: {e}")))?;
    std::fs::write(path, file).map_err(|e| data_error(path, format!("cannot be written: {e}")))
}

fn to_bf16(x: f64) -> f64 {
    half::bf16::from_f64(x).to_f64()
}

fn whole<T: Float>(values: &Vec<T>) -> View<'_, Cpu<T>> {
    View::new(values, values.len())
}

fn to_f64<T: Float>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

fn from_f64<T: Float>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::from_f64(x)).collect()
}
