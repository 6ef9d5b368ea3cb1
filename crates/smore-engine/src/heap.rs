//! How a program's heap is kept: training allocates the same large buffers step after step.
//!
//! For programs; libraries leave the allocator to them. Where the C library is not glibc on Linux nothing is
//! done, and nothing depends on it but time.

/// Keeps what is freed for what is allocated next, buffers of any size, and asks the system for large pages (2 MiB
/// on x86-64) below them. Given back and asked for again, each page costs a fault and is zeroed; and where pages are
/// small, products wait for their addresses.
///
/// To be called before a program starts a thread. Address space for three quarters of the machine's memory is
/// asked for, which takes no memory; it is left where address space is limited or the system refuses.
pub fn prepare() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt sets numbers of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        // -1 stands for never.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        // One heap for all threads: each finds the room that another has left.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        glibc::lay_on_large_pages();
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    /// The allocator grows its heap by what is missing, and advice holds for what is there: so it is made to grow
    /// once.
    pub(super) fn lay_on_large_pages() {
        let unlimited = [libc::RLIMIT_AS, libc::RLIMIT_DATA].into_iter().all(|resource| {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: a limit is written to where one is.
            let told = unsafe { libc::getrlimit(resource, &raw mut limit) };
            told == 0 && limit.rlim_cur == libc::RLIM_INFINITY
        });
        // SAFETY: asks for numbers of the system.
        let [page, pages] =
            [libc::_SC_PAGESIZE, libc::_SC_PHYS_PAGES].map(|name| unsafe { libc::sysconf(name) });
        let (Ok(page), Ok(pages)) = (usize::try_from(page), usize::try_from(pages)) else { return };
        if !unlimited {
            return;
        }
        let room = pages / 4 * 3 * page;
        // SAFETY: what is allocated is freed, and the advice is for whole pages inside it.
        unsafe {
            let start = libc::malloc(room);
            if !start.is_null() {
                let before = start.align_offset(page);
                let whole = (room - before) / page * page;
                // A system without large pages refuses, and small ones do.
                libc::madvise(start.byte_add(before), whole, libc::MADV_HUGEPAGE);
            }
            libc::free(start);
        }
    }
}
