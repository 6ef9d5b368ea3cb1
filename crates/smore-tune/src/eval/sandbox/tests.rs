//! Programs that try to do harm.

use super::*;

fn limits() -> Limits {
    Limits { time: Duration::from_secs(3), memory: 256 << 20, processes: 16 }
}

/// The sandbox, where there can be one. CI installs bubblewrap; a container may forbid namespaces
/// all the same, and only trying tells.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn sandbox() -> Option<Sandbox> {
    match Sandbox::open(limits()) {
        Ok(sandbox) => Some(sandbox),
        Err(e) => {
            eprintln!("NOT TESTED: the sandbox for programs cannot be tried here: {e}");
            None
        }
    }
}

/// What a hostile program must come to.
#[derive(Debug)]
enum Must {
    Stop,
    Fail,
    /// Its own assertions say that it got nowhere.
    Pass,
}

fn refuses(action: &str) -> String {
    format!(
        "import os, socket, ctypes, pathlib\ntry:\n    {action}\nexcept (OSError, MemoryError):\n    \
         pass\nelse:\n    raise SystemExit('could')\n"
    )
}

#[test]
fn hostile_programs_are_contained() {
    let Some(sandbox) = sandbox() else { return };
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "kept").unwrap();
    let secret = secret.display();
    let home = std::env::var("HOME").unwrap_or("/root".into());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let pid = std::process::id();
    let programs: Vec<(&str, String, Must)> = vec![
        ("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass".into(), Must::Stop),
        (
            "threads without end",
            "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(60,)).start()".into(),
            Must::Fail,
        ),
        ("endless loop", "while True: pass".into(), Must::Stop),
        ("long sleep", "import time\ntime.sleep(600)".into(), Must::Stop),
        ("memory in one piece", "x = bytearray(4 << 30)".into(), Must::Fail),
        (
            "memory of many processes",
            "import os, time\nfor _ in range(6): \n    if os.fork() == 0: x = bytearray(os.urandom(1)) * (120 << 20); time.sleep(60)\ntime.sleep(60)".into(),
            Must::Stop,
        ),
        ("endless output", "while True: print('x' * 10000)".into(), Must::Stop),
        ("network", refuses(&format!("socket.create_connection(('127.0.0.1', {port}), 1)")), Must::Pass),
        ("names on the network", refuses("socket.getaddrinfo('example.org', 80)"), Must::Pass),
        ("reads the home folder", refuses(&format!("os.listdir({home:?})")), Must::Pass),
        ("reads a file outside", refuses(&format!("open('{secret}').read()")), Must::Pass),
        ("writes a file outside", refuses(&format!("open('{secret}', 'w').write('lost')")), Must::Pass),
        ("writes into the system", refuses("open('/usr/bin/evil', 'w')"), Must::Pass),
        ("writes at the root", refuses("open('/evil', 'w')"), Must::Pass),
        (
            "fills the disk",
            "for i in range(100):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))".into(),
            Must::Fail,
        ),
        ("kills us", refuses(&format!("os.kill({pid}, 9)")), Must::Pass),
        ("mounts", refuses("r = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None)\n    if r: raise OSError"), Must::Pass),
        ("leaves early as if all were well", "import os\nos._exit(0)".into(), Must::Fail),
        ("raises its limits", "import resource as r\nr.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))".into(), Must::Fail),
    ];
    for (name, source, must) in &programs {
        let start = Instant::now();
        let outcome = sandbox.run(source).unwrap();
        let as_expected = match must {
            Must::Stop => matches!(outcome, Outcome::Stopped(_)),
            Must::Fail => !outcome.passed(),
            Must::Pass => outcome.passed(),
        };
        assert!(as_expected, "{name}: {outcome:?}, expected {must:?}");
        assert!(start.elapsed() < Duration::from_secs(30), "{name} ran {:?}", start.elapsed());
    }
    assert_eq!(fs::read_to_string(outside.path().join("secret")).unwrap(), "kept");
}

/// Where the system's limit on processes does not bind, as for root in some containers, looking must
/// still end a fork bomb soon.
#[test]
fn a_fork_bomb_ends_without_the_systems_limit() {
    let Some(mut sandbox) = sandbox() else { return };
    sandbox.as_nobody = false;
    if !sandbox.run("pass").unwrap().passed() {
        return;
    }
    let start = Instant::now();
    let outcome = sandbox
        .run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
        .unwrap();
    assert!(matches!(outcome, Outcome::Stopped(_)), "{outcome:?}");
    assert!(start.elapsed() < Duration::from_mins(1), "ran {:?}", start.elapsed());
}

/// Whoever looks goes first where that is allowed, and as before afterwards.
#[test]
fn looking_has_priority_and_gives_it_back() {
    let before = getpriority_process(None).unwrap();
    let first = First::now();
    let during = getpriority_process(None).unwrap();
    assert_eq!(during, if first.before.is_some() { -20 } else { before });
    drop(first);
    assert_eq!(getpriority_process(None).unwrap(), before);
}

/// Nothing of a stopped program is left.
#[test]
fn no_process_outlives_its_program() {
    let Some(mut sandbox) = sandbox() else { return };
    sandbox.limits.time = Duration::from_millis(700);
    let mark = format!("left-over-{}", std::process::id());
    let source = format!(
        "import os, sys\nos.setsid() if os.fork() == 0 else None\nos.execv('/bin/sleep', ['{mark}', '600'])"
    );
    assert!(!sandbox.run(&source).unwrap().passed());
    let running = || {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line.starts_with(mark.as_bytes())
        })
    };
    // The system takes the namespace down a moment after bubblewrap is gone.
    let gone = (0..500).any(|_| {
        thread::sleep(Duration::from_millis(10));
        !running()
    });
    assert!(gone, "a process of a stopped program still runs");
}

#[test]
fn honest_programs_pass_and_wrong_ones_say_why() {
    let Some(sandbox) = sandbox() else { return };
    assert!(sandbox.run("import math\nassert math.gcd(12, 18) == 6").unwrap().passed());
    let wrong = sandbox.run("assert 1 + 1 == 3, 'sum'").unwrap();
    assert_eq!(wrong, Outcome::Failed("AssertionError: sum".into()));
}
