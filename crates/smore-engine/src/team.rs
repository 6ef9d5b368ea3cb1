//! The threads that share an operation's work: rayon's, kept awake from one operation to the next.
//!
//! A training step is thousands of operations of a fraction of a millisecond. A thread that falls asleep
//! between two of them is woken too late for the second, in virtual machines most of all
//! (docs/performance.md). So threads that were called stay until they have been without work for a while.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread without work stays.
const PATIENCE: Duration = Duration::from_millis(2);
/// Looks for something new between two looks at the clock.
const LOOKS: usize = 64;
/// Looks at the clock between two offers of the processor to others.
const POLITE: usize = 16;
/// Works that are shared at the same time: one inside the other, or beside it.
const PLACES: usize = 8;

/// Runs `work` on each of the items, on all threads. Each thread begins with a run of items of its own,
/// the same one for as many items, so that it finds what it wrote before in its cache, and goes on with
/// those of others. An item should be worth some microseconds.
pub fn each<I>(items: I, work: impl Fn(I::Item) + Sync)
where
    I: Iterator<Item: Send>,
{
    each_with(items, || (), |(), item| work(item));
}

/// As [`each`], with something that every thread makes for itself.
pub fn each_with<I, S>(items: I, own: impl Fn() -> S + Sync, work: impl Fn(&mut S, I::Item) + Sync)
where
    I: Iterator<Item: Send>,
{
    let few = items.size_hint().1.is_some_and(|most| most < 2);
    let threads = rayon::current_num_threads();
    if few || threads == 1 {
        let mut own = own();
        return items.for_each(|item| work(&mut own, item));
    }
    let items: Vec<_> = items.map(|item| Mutex::new(Some(item))).collect();
    let start = |run: usize| items.len() * run / threads;
    let runs: Vec<_> = (0..threads).map(|run| Run { next: start(run).into() }).collect();
    let turn = || {
        let mut mine = None;
        let first = SEAT.get();
        for run in (first..threads).chain(0..first) {
            loop {
                let next = runs[run].next.fetch_add(1, SeqCst);
                if next >= start(run + 1) {
                    break;
                }
                let item = locked(&items[next]).take().expect("an item is taken once");
                work(mine.get_or_insert_with(&own), item);
            }
        }
    };
    share(&turn, || ());
}

/// Where the next item is taken from a run of them.
#[repr(align(64))]
struct Run {
    next: AtomicUsize,
}

/// What `work` makes of the items, in their order.
pub fn map<I, R: Send>(items: I, work: impl Fn(I::Item) -> R + Sync) -> Vec<R>
where
    I: ExactSizeIterator<Item: Send>,
{
    let mut results: Vec<Option<R>> = (0..items.len()).map(|_| None).collect();
    each(items.zip(&mut results), |(item, result)| *result = Some(work(item)));
    results.into_iter().flatten().collect()
}

/// Runs two works that do not need each other side by side.
pub fn both<A: Send, B>(one: impl FnOnce() -> A + Send, other: impl FnOnce() -> B) -> (A, B) {
    let (one, result) = (Mutex::new(Some(one)), Mutex::new(None));
    let turn = || {
        let one = locked(&one).take();
        if let Some(one) = one {
            let value = one();
            *locked(&result) = Some(value);
        }
    };
    let other = share(&turn, other);
    let result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
    (result.expect("it ran, or what it panicked with went on"), other)
}

thread_local! {
    /// The team of which this thread is a member: that of another thread for as long as it stays there,
    /// else its own.
    static CURRENT: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
    /// Which run of items this thread begins with: 0 in its own team.
    static SEAT: Cell<usize> = const { Cell::new(0) };
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the team run `work`, each thread once at most, while this one runs `meanwhile` and then `work`.
/// Returns when all are done; what one of them panicked with goes on from here.
fn share<R>(work: &(dyn Fn() + Sync), meanwhile: impl FnOnce() -> R) -> R {
    let panicked = Mutex::new(None);
    let turn = || {
        if let Err(why) = catch_unwind(AssertUnwindSafe(work)) {
            locked(&panicked).get_or_insert(why);
        }
    };
    let team = CURRENT.with_borrow_mut(|team| Arc::clone(team.get_or_insert_with(Team::led)));
    let place = team.put_up(&turn);
    let result = catch_unwind(AssertUnwindSafe(meanwhile));
    turn();
    if let Some(place) = place {
        place.take_down();
    }
    if let Some(why) = panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(why);
    }
    result.unwrap_or_else(|why| resume_unwind(why))
}

#[derive(Default)]
struct Team {
    places: [Place; PLACES],
    /// Counts the works put up.
    news: AtomicUsize,
    /// Threads that were called and have not left.
    members: AtomicUsize,
    /// Those that nobody has.
    seats: Mutex<Vec<usize>>,
}

impl Team {
    /// That of the thread which calls this, with nobody else in it.
    fn led() -> Arc<Self> {
        let seats = Mutex::new((1..rayon::current_num_threads()).rev().collect());
        Arc::new(Self { seats, ..Self::default() })
    }

    /// Puts up a work in a free place, if there is one, and calls the threads that are not here.
    fn put_up(self: &Arc<Self>, work: &(dyn Fn() + Sync)) -> Option<&Place> {
        let place = self.places.iter().find(|place| !place.taken.swap(true, SeqCst))?;
        place.put_up(work);
        // In this order: a thread that leaves gives up its membership and then looks for news.
        self.news.fetch_add(1, SeqCst);
        let wanted = rayon::current_num_threads() - 1;
        while self.members.load(SeqCst) < wanted {
            self.members.fetch_add(1, SeqCst);
            let team = Arc::clone(self);
            rayon::spawn(move || team.join());
        }
        Some(place)
    }

    /// What a called thread does.
    fn join(self: &Arc<Self>) {
        let seat = locked(&self.seats).pop();
        let before = (CURRENT.replace(Some(Arc::clone(self))), SEAT.replace(seat.unwrap_or(0)));
        self.help();
        CURRENT.set(before.0);
        SEAT.set(before.1);
        locked(&self.seats).extend(seat);
    }

    /// Works until there is nothing to do for a while, and gives up the membership.
    fn help(&self) {
        let mut done = [0; PLACES];
        loop {
            let news = self.news.load(SeqCst);
            let places = self.places.iter().zip(&mut done);
            let worked = places.fold(false, |worked, (place, done)| place.work(done) || worked);
            if worked || self.hears_more_than(news) {
                continue;
            }
            self.members.fetch_sub(1, SeqCst);
            if self.news.load(SeqCst) == news {
                return;
            }
            self.members.fetch_add(1, SeqCst);
        }
    }

    /// Waits for more news.
    fn hears_more_than(&self, news: usize) -> bool {
        let start = Instant::now();
        for round in 1usize.. {
            for _ in 0..LOOKS {
                if self.news.load(SeqCst) != news {
                    return true;
                }
                spin_loop();
            }
            if start.elapsed() > PATIENCE {
                break;
            }
            if round.is_multiple_of(POLITE) {
                thread::yield_now();
            }
        }
        false
    }
}

/// Where a work is put up for others.
#[derive(Default)]
#[repr(align(64))]
struct Place {
    taken: AtomicBool,
    /// Goes up when a work is put up, to an odd number, and when it is taken down.
    turn: AtomicUsize,
    /// Threads that may be at the work.
    inside: AtomicUsize,
    work: UnsafeCell<Option<&'static (dyn Fn() + Sync)>>,
}

// SAFETY: the work is written by who has taken the place, while the turn is even and nobody is inside,
// and read by who came inside while the turn was odd.
unsafe impl Sync for Place {}
// SAFETY: as above; a work may be called from any thread.
unsafe impl Send for Place {}

impl Place {
    /// For who has taken this place.
    fn put_up(&self, work: &(dyn Fn() + Sync)) {
        // SAFETY: nobody is inside. The work outlives its stay here: `take_down` returns when all have
        // left, and `share` calls it on every way out.
        unsafe {
            *self.work.get() =
                Some(std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(work));
        }
        self.turn.fetch_add(1, SeqCst);
    }

    fn take_down(&self) {
        self.turn.fetch_add(1, SeqCst);
        let mut looks = 0usize;
        while self.inside.load(SeqCst) > 0 {
            spin_loop();
            looks += 1;
            if looks.is_multiple_of(LOOKS * POLITE) {
                thread::yield_now();
            }
        }
        self.taken.store(false, SeqCst);
    }

    /// Runs the work that is up, if this thread has not yet; `done` is the turn at which it last did.
    fn work(&self, done: &mut usize) -> bool {
        let turn = self.turn.load(SeqCst);
        if turn.is_multiple_of(2) || turn == *done {
            return false;
        }
        self.inside.fetch_add(1, SeqCst);
        // Still up: who takes it down from here on finds this thread inside.
        let up = self.turn.load(SeqCst) == turn;
        if up {
            // SAFETY: it was written before the turn became odd, and stays until this thread has left.
            if let Some(work) = unsafe { *self.work.get() } {
                work();
            }
            *done = turn;
        }
        self.inside.fetch_sub(1, SeqCst);
        up
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn on<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }

    /// Inside one another and beside each other, and when threads have left meanwhile.
    #[test]
    fn every_item_is_worked_on_once() {
        for threads in [1, 2, 3, 8] {
            on(threads, || {
                let square = |n: usize| map(0..n, |i| i * i);
                let want = |n: usize| (0..n).map(|i| i * i).collect::<Vec<_>>();
                for n in [0, 1, 2, 5, 1000] {
                    assert_eq!(square(n), want(n));
                }
                for round in 0..500 {
                    assert_eq!(square(round), want(round));
                }
                thread::sleep(PATIENCE * 3);
                let nested = map(0..40, square);
                assert!(nested.iter().enumerate().all(|(i, got)| *got == want(i)));
                let (one, other) = both(|| square(300), || square(200));
                assert!(one == want(300) && other == want(200));
            });
        }
    }

    /// All threads of the pool take part, and each makes its own thing once.
    #[test]
    fn all_threads_come() {
        on(3, || {
            let seen = Mutex::new(HashSet::new());
            let made = AtomicUsize::new(0);
            let own = || made.fetch_add(1, SeqCst);
            // Nobody goes on before three are here.
            each_with(0..3, own, |_, _| {
                seen.lock().unwrap().insert(thread::current().id());
                while seen.lock().unwrap().len() < 3 {
                    thread::yield_now();
                }
            });
            assert_eq!((seen.into_inner().unwrap().len(), made.into_inner()), (3, 3));
        });
    }

    #[test]
    fn a_panic_goes_on_where_the_work_was_shared_and_the_team_stays() {
        on(3, || {
            for culprit in [0, 50, 99] {
                let caught = catch_unwind(|| {
                    each(0..100, |i| assert_ne!(i, culprit, "the culprit"));
                });
                let why = *caught.unwrap_err().downcast::<String>().unwrap();
                assert!(why.contains("the culprit"), "{why}");
                let caught = catch_unwind(|| both(|| panic!("one"), || 1));
                assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "one");
                let caught = catch_unwind(|| both(|| 1, || panic!("other")));
                assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "other");
                assert_eq!(map(0..100, |i| i), (0..100).collect::<Vec<_>>());
            }
        });
    }

    /// Several leaders in one pool do not wait for each other.
    #[test]
    fn teams_of_one_pool_do_not_hinder_each_other() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let turns = [const { AtomicUsize::new(0) }; 4];
        pool.scope(|scope| {
            for own in 0..4 {
                let turns = &turns;
                scope.spawn(move |_| {
                    for _ in 0..200 {
                        each(0..10, |_| _ = turns[own].fetch_add(1, SeqCst));
                    }
                });
            }
        });
        assert!(turns.iter().all(|turns| turns.load(SeqCst) == 2000));
    }
}
