//! What a lane allocates, and that lanes on several threads give the same bits. All of the crate's
//! unit tests run with the allocator that counts here.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    path::Path,
    sync::Barrier,
    thread,
};

use super::*;
use crate::infer::{load::checkpoint, selftest, wanted::Use};

/// The system's, which counts what each thread asks for.
struct Counting;

thread_local! {
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all is left to the system's allocator; the counter is a constant cell without a
// destructor, so that counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ASKED.set(ASKED.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often this thread asks for memory in `what`.
fn asked<T>(what: impl FnOnce() -> T) -> (usize, T) {
    let before = ASKED.get();
    let result = what();
    (ASKED.get() - before, result)
}

/// The shipped checkpoint for up to so many pictures, and its side.
fn shipped(max_batch: usize) -> (Own, usize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/ghostnet-1x-demo.safetensors");
    let (checkpoint, config) = checkpoint(&path).unwrap();
    let metadata = checkpoint.metadata;
    let side = metadata.input;
    let tensors = &checkpoint.tensors;
    let network = Network { config, tensors, side, mean: metadata.mean, std: metadata.std };
    let wanted = Wanted { device: Use::Native, precision: None, max_batch, buckets: None };
    (Own::start(&network, &wanted).unwrap(), side)
}

fn pictures(count: usize, side: usize) -> Vec<Vec<u8>> {
    let all = selftest::pictures(side);
    let turned =
        |it: usize| all[it % all.len()].iter().map(move |byte| byte.rotate_left(it as u32));
    (0..count).map(|it| turned(it).collect()).collect()
}

#[test]
fn a_warm_lane_allocates_nothing_and_an_engine_only_its_answer() {
    // More pictures than go through the network together.
    const MOST: usize = 19;
    let (mut first, side) = shipped(MOST);
    let pictures = pictures(MOST, side);
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let (made, vector) = asked(|| vec![0_u8; 64]);
    assert_eq!((made, vector.len()), (1, 64), "the allocator counts");
    first.warm_up().unwrap();
    let mut second = first.lane().unwrap();
    second.warm_up().unwrap();
    for count in [1, 2, 8, 9, MOST, 3] {
        let batch = &batch[..count];
        for engine in [&mut first as &mut dyn Backend, second.as_mut()] {
            let (times, answer) = asked(|| engine.forward(batch).unwrap());
            // A row for each picture, and the list of rows.
            assert_eq!((times, answer.len()), (count + 1, count));
        }
        let Own { lane, logits, .. } = &mut first;
        logits.clear();
        assert_eq!(asked(|| lane.forward(batch, logits)).0, 0, "a batch of {count}");
    }
}

#[test]
fn two_lanes_at_once_give_the_bits_of_one() {
    let (mut first, side) = shipped(8);
    let pictures = pictures(11, side);
    let batch: Vec<&[u8]> = pictures.iter().map(Vec::as_slice).collect();
    let want: Vec<Vec<f32>> =
        batch.iter().map(|it| first.forward(&[it]).unwrap().remove(0)).collect();
    let together = Barrier::new(2);
    thread::scope(|scope| {
        for lane in 0..2 {
            let mut lane_of = first.lane().unwrap();
            let (batch, want, together) = (&batch, &want, &together);
            scope.spawn(move || {
                lane_of.warm_up().unwrap();
                for round in 0..12 {
                    // Sizes that differ between the lanes at any time.
                    let (from, count) = (round % 4, 1 + (3 * round + 5 * lane) % 7);
                    together.wait();
                    let got = lane_of.forward(&batch[from..][..count]).unwrap();
                    assert_eq!(got, want[from..][..count], "lane {lane}, round {round}");
                }
            });
        }
    });
}
