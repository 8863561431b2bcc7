//! vCPU threads.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use devices::PowerEvent;
use devices::event_loop::panic_message;
use devices::sandbox::{Confinement, ThreadKind};
use hypervisor::{Exit, ExitHandler, Kicker, Vcpu};
use memory::{CachedView, SpaceKind, Topology};
use parking_lot::Mutex;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::core_sharing::CoreSharing;
use super::run_control::{Dismissal, RunControl, Want};
use crate::failure;
use crate::guest_event::{self, GuestEvent, Reporter};

/// A vCPU's thread, seen from the driver.
pub(crate) struct VcpuThread {
    index: u32,
    kicker: Kicker,
    dismissal: Dismissal,
    nmi: Arc<AtomicBool>,
    jobs: Sender<Job>,
    times: Arc<OnceLock<File>>,
    thread: JoinHandle<Option<Vcpu>>,
}

/// The kernel's account of a thread, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadTimes {
    /// The thread ran, in the guest or for it.
    pub(crate) run_ns: u64,
    /// The thread was ready to run and waited for a CPU of the host: what a guest calls steal time.
    pub(crate) wait_ns: u64,
}

impl ThreadTimes {
    /// Reads the text of `/proc/thread-self/schedstat` (proc(5)).
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split_whitespace().map(str::parse);
        let (run_ns, wait_ns) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
        Some(Self { run_ns, wait_ns })
    }
}

/// The part of the host's CPUs that a vCPU's thread may use.
pub(super) struct HostShare {
    /// Numbers of CPUs; all when absent.
    pub(super) cpus: Option<Vec<usize>>,
    pub(super) cores: CoreSharing,
}

/// A job for a vCPU's own thread, while the vCPU is out of the guest.
type Job = Box<dyn FnOnce(&mut Vcpu) + Send>;

impl VcpuThread {
    /// Starts the thread, which parks before it runs anything. If the host gives no thread, the vCPU
    /// comes back: KVM cannot make it a second time.
    pub(super) fn start(
        vcpu: Vcpu,
        topology: &Topology,
        control: &Arc<RunControl>,
        reporter: Reporter,
        share: HostShare,
        confinement: Confinement,
    ) -> Result<Self, (Option<Vcpu>, std::io::Error)> {
        let (index, kicker) = (vcpu.index(), vcpu.kicker());
        let (nmi, dismissal) = (Arc::new(AtomicBool::new(false)), Dismissal::default());
        // Before the thread is spawned, and taken back if it cannot be.
        control.enroll(index, kicker.clone());
        let bus = Bus {
            memory: CachedView::new(topology.space(SpaceKind::Memory)),
            io: CachedView::new(topology.space(SpaceKind::PortIo)),
            confinement,
        };
        let (jobs, inbox) = channel();
        let times = Arc::new(OnceLock::new());
        let account = Arc::clone(&times);
        let span = tracing::Span::current();
        let orders = Orders {
            control: Arc::clone(control),
            dismissal: dismissal.clone(),
            nmi: Arc::clone(&nmi),
            jobs: inbox,
        };
        // A thread that is not spawned drops its closure, and would close the vCPU. KVM cannot
        // create a second one of this id, so it must survive.
        let slot = Arc::new(Mutex::new(Some(vcpu)));
        let vcpu = Arc::clone(&slot);
        let thread = Builder::new()
            // libvirt reads the vCPU's number from these names, with strtol() behind `vcpu`.
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let _entered = span.entered();
                // Opened before the thread's sandbox denies it. Without the file there are no times.
                if let Ok(file) = File::open("/proc/thread-self/schedstat") {
                    let _ = account.set(file);
                }
                if let Some(cpus) = share.cpus {
                    bind(&cpus);
                }
                // Before the guest runs, and before the thread's sandbox denies it.
                let member = share.cores.enter();
                let mut vcpu = vcpu.lock().take()?;
                let failed = member.as_ref().err();
                let failed = failed.map(|error| failure::cannot_isolate(index, *error));
                run(&mut vcpu, bus, &orders, &reporter, failed);
                Some(vcpu)
            });
        let thread = thread.map_err(|error| {
            control.withdraw(index);
            (slot.lock().take(), error)
        })?;
        Ok(Self {
            index,
            kicker,
            dismissal,
            nmi,
            jobs,
            times,
            thread,
        })
    }

    /// Has a job done on the vCPU's own thread. The result comes over the channel, which ends
    /// without one when the thread has ended. The caller nudges and kicks the threads next.
    pub(crate) fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Vcpu) -> R + Send + 'static,
    ) -> Receiver<R> {
        let (answer, answers) = channel();
        let job = move |vcpu: &mut Vcpu| {
            // The caller may have stopped waiting.
            let _ = answer.send(job(vcpu));
        };
        // A thread that has ended drops the job, and with it the other end of the channel.
        let _ = self.jobs.send(Box::new(job));
        answers
    }

    /// Returns how long the thread has run and waited so far, if the kernel tells.
    pub(crate) fn times(&self) -> Option<ThreadTimes> {
        let mut text = [0; 64];
        let len = self.times.get()?.read_at(&mut text, 0).ok()?;
        ThreadTimes::parse(std::str::from_utf8(text.get(..len)?).ok()?)
    }

    /// Gets the vCPU out of the guest, to see what is wanted.
    pub(crate) fn kick(&self) {
        self.kicker.kick();
    }

    /// Injects a non-maskable interrupt before the vCPU next runs.
    pub(crate) fn inject_nmi(&self) {
        // The flag before the kick, by which the vCPU leaves the guest and looks at it.
        self.nmi.store(true, Ordering::Release);
        self.kicker.kick();
    }

    /// Has the thread end, whatever is wanted of the others. Does not wait for that.
    pub(super) fn dismiss(&self, control: &RunControl) {
        control.dismiss(self.index, &self.dismissal);
    }

    /// Waits for the thread's end, which must be wanted. Returns the vCPU, unless the thread panicked.
    pub(super) fn join(self) -> Option<Vcpu> {
        self.thread.join().unwrap_or_else(|_| {
            tracing::error!("a vCPU thread panicked");
            None
        })
    }
}

/// How many CPUs the host can have, of those to which a thread can be bound.
pub(crate) fn host_cpus() -> usize {
    // Ranges such as `0-3,8-11`, ascending.
    let possible = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = possible.trim().rsplit([',', '-']).next();
    let last: Option<usize> = last.and_then(|last| last.parse().ok());
    last.map_or(CpuSet::MAX_CPU, |last| {
        last.saturating_add(1).min(CpuSet::MAX_CPU)
    })
}

fn bind(cpus: &[usize]) {
    let mut set = CpuSet::new();
    cpus.iter()
        .filter(|cpu| **cpu < CpuSet::MAX_CPU)
        .for_each(|cpu| set.set(*cpu));
    if let Err(error) = sched_setaffinity(None, &set) {
        tracing::warn!(?cpus, %error, "cannot bind a vCPU to these CPUs of the host");
    }
}

/// The requests that reach a vCPU's thread.
struct Orders {
    control: Arc<RunControl>,
    dismissal: Dismissal,
    nmi: Arc<AtomicBool>,
    jobs: Receiver<Job>,
}

impl Orders {
    fn wanted(&self) -> Want {
        self.control.wanted_of(&self.dismissal)
    }

    fn do_jobs(&self, vcpu: &mut Vcpu) {
        for job in self.jobs.try_iter() {
            // A panic ends the job alone: its caller finds the channel closed. The thread must live on
            // to be counted as parked, or every later pause would wait for it.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(vcpu))) {
                let message = panic_message(panic.as_ref());
                tracing::error!(message, "a request to a vCPU panicked");
            }
        }
    }
}

/// `failed` is the reason for which the vCPU cannot run at all.
fn run(
    vcpu: &mut Vcpu,
    mut bus: Bus,
    orders: &Orders,
    reporter: &Reporter,
    failed: Option<spec::Failure>,
) {
    let mut first = vcpu.index() == 0;
    let confined = bus.confinement.enter(ThreadKind::Vcpu);
    let cannot_confine = |error| failure::cannot_confine(vcpu.index(), &error);
    let mut failed = failed.or_else(|| confined.err().map(cannot_confine));
    let (control, dismissal) = (&orders.control, &orders.dismissal);
    loop {
        if let Some(failure) = failed.take() {
            // Before the park: an owner that waits for the vCPUs then finds the reason in its
            // events.
            reporter.report(GuestEvent::Failed(failure));
            control.park_for_good(dismissal, || orders.do_jobs(vcpu));
            return;
        }
        match control.park(dismissal, || orders.do_jobs(vcpu)) {
            Want::End => return,
            Want::Park => continue,
            Want::Run => vcpu.forgive_stop(),
        }
        if std::mem::take(&mut first) {
            reporter.report(GuestEvent::FirstEntry(Instant::now()));
        }
        // A device that answers the guest runs on this thread. If it panics the guest cannot continue: the
        // access was not answered. The owner must learn that, and this thread must still park and end.
        let ran = catch_unwind(AssertUnwindSafe(|| {
            run_until_wanted(vcpu, &mut bus, orders)
        }));
        failed = ran.unwrap_or_else(|panic| {
            let message = panic_message(panic.as_ref());
            tracing::error!(message, "a vCPU thread panicked");
            Some(failure::vcpu_panicked(vcpu.index(), message))
        });
    }
}

/// Runs the guest until something else is wanted, or it cannot continue.
fn run_until_wanted(vcpu: &mut Vcpu, bus: &mut Bus, orders: &Orders) -> Option<spec::Failure> {
    while orders.wanted() == Want::Run {
        if orders.nmi.swap(false, Ordering::AcqRel)
            && let Err(error) = vcpu.nmi()
        {
            tracing::warn!(%error, "an NMI was lost");
        }
        match vcpu.run(bus) {
            Exit::Handled => {}
            Exit::Interrupted => {
                orders.do_jobs(vcpu);
                orders.control.rest_if_throttled();
            }
            Exit::Shutdown => return Some(failure::triple_fault(vcpu)),
            Exit::Failed(why) => return Some(failure::cannot_run(vcpu.index(), &why)),
        }
        // Before the guest runs again. The check is a load of a thread-local variable.
        if let Some(failure) = bus.violation(vcpu.index()) {
            return Some(failure);
        }
    }
    // What the guest reads next must not depend on when it runs again.
    if orders.wanted() != Want::End {
        // KVM finishes an access at the next KVM_RUN alone. Saved before that, the instruction
        // would be repeated elsewhere, and a read that takes bits would take them twice.
        vcpu.complete_access(bus);
    }
    bus.violation(vcpu.index())
}

/// Answers a vCPU's accesses with the map in force.
struct Bus {
    memory: CachedView,
    io: CachedView,
    confinement: Confinement,
}

impl Bus {
    /// Describes the system call that the sandbox refused while it answered this vCPU's accesses.
    fn violation(&self, vcpu: u32) -> Option<spec::Failure> {
        let violation = self.confinement.violation()?;
        Some(guest_event::sandbox_violation(
            &violation.to_string(),
            Some(vcpu),
        ))
    }
}

impl ExitHandler for Bus {
    fn io_read(&mut self, port: u16, data: &mut [u8]) {
        self.io.view().read(port.into(), data);
    }

    fn io_write(&mut self, port: u16, data: &[u8]) {
        self.io.view().write(port.into(), data);
    }

    fn mmio_read(&mut self, addr: u64, data: &mut [u8]) {
        self.memory.view().read(addr, data);
    }

    fn mmio_write(&mut self, addr: u64, data: &[u8]) {
        self.memory.view().write(addr, data);
    }
}

/// From one moment at which throttled vCPUs may begin to run to the next.
const THROTTLE_PERIOD: Duration = Duration::from_millis(10);

/// Ends a machine's vCPUs, from any thread, whatever its driver waits for.
pub(crate) struct Halter(Arc<RunControl>);

impl Halter {
    pub(crate) fn new(control: Arc<RunControl>) -> Self {
        Self(control)
    }

    /// From now on the guest executes nothing any more. Does not wait for the threads.
    pub(crate) fn halt(&self) {
        self.0.want(Want::End);
        self.0.kick();
    }
}

/// Ends the guest when it resets or powers off.
pub(super) struct GuestEnd {
    pub(super) reporter: Reporter,
    pub(super) halter: Arc<Halter>,
}

impl GuestEnd {
    /// Returns the handler of the devices by which a guest ends. It runs on the vCPU's thread, in
    /// the instruction by which the guest ends, and no vCPU returns to the guest: whatever would
    /// run behind that instruction would run in a machine that its guest believes to be gone.
    pub(super) fn handler(&self) -> impl Fn(PowerEvent) + Send + Sync + 'static + use<> {
        let (reporter, halter) = (self.reporter.clone(), Arc::clone(&self.halter));
        move |event| {
            // First, so that a reader of the end of the vCPUs also finds its reason.
            reporter.report(GuestEvent::Power(event));
            halter.halt();
        }
    }
}

/// Keeps a machine's vCPUs from running for a part of the time.
pub(crate) struct Throttle {
    control: Arc<RunControl>,
    percent: Arc<AtomicU8>,
    ticker: Option<JoinHandle<()>>,
}

impl Throttle {
    pub(crate) fn new(control: Arc<RunControl>) -> Self {
        Self {
            control,
            percent: Arc::default(),
            ticker: None,
        }
    }

    /// Keeps the vCPUs out of the guest for `percent` of the time; 0 ends throttling.
    pub(crate) fn set(&mut self, percent: u8) {
        let percent = percent.min(99);
        self.percent.store(percent, Ordering::Release);
        let is_over = self.ticker.as_ref().is_none_or(JoinHandle::is_finished);
        if percent == 0 || !is_over {
            return;
        }
        let (percent, control) = (Arc::clone(&self.percent), Arc::clone(&self.control));
        let tick = move || {
            while let part @ 1.. = u32::from(percent.load(Ordering::Acquire)) {
                control.throttle_until(Instant::now() + THROTTLE_PERIOD * part / 100);
                control.kick();
                std::thread::sleep(THROTTLE_PERIOD);
            }
        };
        match Builder::new().name("throttle".to_owned()).spawn(tick) {
            Ok(ticker) => self.ticker = Some(ticker),
            Err(error) => tracing::warn!(%error, "cannot slow vCPUs down"),
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.percent.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_of_a_thread_is_read() {
        let times = ThreadTimes::parse("1500 20 3\n").unwrap();
        assert_eq!((times.run_ns, times.wait_ns), (1500, 20));
        for text in ["", "1500", "1500 x 3", "-1 2 3"] {
            assert_eq!(ThreadTimes::parse(text), None, "{text}");
        }
    }
}
