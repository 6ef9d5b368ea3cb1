//! A pass that shows what adapters do, and passes with a part of an adapter taken out.

use super::block::BlockSaved;
use super::{Batch, Model};
use crate::inject::Slot;
use smore::adapter::{AnyAdapter, AnySaved, BlockAdapter, Mode, Removed};
use smore::kernel::{AdapterKernels, Pass, Routing, contributions};
use smore::tree::Removal;
use smore_engine::{Cpu, Device, View};

impl<D: AdapterKernels> Model<D> {
    /// The input of every block over a batch, `[n, hidden]` each.
    pub fn block_inputs(&self, batch: &Batch) -> Vec<D::Buf> {
        let mut x = self.embedded(batch);
        let run = |b| {
            let input = self.copy(&x);
            self.run_block(b, &mut x, batch, Mode::plain());
            input
        };
        (0..self.spec.blocks).map(run).collect()
    }

    /// -ln p of every target with `what` taken out of the adapter at `slot`, given the block
    /// inputs of the same batch. Adapters behind it route anew, as they would.
    pub fn losses_without(
        &self,
        batch: &Batch,
        inputs: &[D::Buf],
        slot: &Slot,
        what: &Removal,
    ) -> Vec<f64> {
        let removed = Some(Removed { place: slot.place as u64, what });
        let mode = Mode { removed, ..Mode::plain() };
        self.losses_from(slot.block, self.copy(&inputs[slot.block]), batch, mode).0
    }
}

impl Model<Cpu<f32>> {
    /// Shows every routed adapter's trees over a batch, and of S'MoRE what each node contributes
    /// (see [`contributions`]).
    pub fn traced(
        &self,
        batch: &Batch,
        mut see: impl FnMut(&Slot, &Routing<f32>, Option<Vec<Vec<f64>>>),
    ) {
        let mut x = self.embedded(batch);
        for b in 0..self.spec.blocks {
            let shape = self.attention_shape(batch, b);
            let saved =
                self.block_forward(b, &mut x, &shape, &batch.positions, Mode::plain(), true);
            let Some(BlockSaved { attention, ffn, .. }) = saved else { continue };
            let maps = attention.adapters.into_iter().chain(ffn.adapters).flatten();
            let in_block = self.adapters.slots.iter().filter(|slot| slot.block == b);
            let (on_maps, in_ffn): (Vec<_>, Vec<_>) =
                in_block.partition(|slot| matches!(slot.adapter, BlockAdapter::Map(_)));
            for (slot, saved) in on_maps.into_iter().zip(maps) {
                let done = self.contributed(slot, &saved);
                if let Some(routing) = saved.routing() {
                    see(slot, routing, done);
                }
            }
            for (slot, saved) in in_ffn.into_iter().zip(&ffn.mix) {
                see(slot, &saved.routing, None);
            }
        }
    }

    fn contributed(&self, slot: &Slot, saved: &AnySaved<Cpu<f32>>) -> Option<Vec<Vec<f64>>> {
        let (BlockAdapter::Map(AnyAdapter::Smore(adapter)), AnySaved::Smore(saved)) =
            (&slot.adapter, saved)
        else {
            return None;
        };
        let params = self.device.download(self.params_view().at(slot.range.clone()));
        let z = self.device.download(View::new(&saved.z, self.device.len(&saved.z)));
        let (spec, layout) = (&adapter.spec, &adapter.layout);
        let pass = Pass { spec, layout, valid: None, noise: None, removed: None };
        Some(contributions(&pass, &saved.routing, &params, &z))
    }
}
