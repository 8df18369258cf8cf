package tools

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// callMark is the environment variable that says to which call a process
// belongs. A process that sheds it gains nothing, see attribute.
const callMark = "CAL_CALL"

// children starts processes and is the only owner of their ends.
//
// As process 1 of a pid namespace it also inherits every orphan and must reap
// it. A second waiter anywhere in the program would lose exit statuses to this one,
// so every child is started here. Elsewhere (a test, a machine without
// namespaces) it waits for its own children only.
type children struct {
	init   bool
	mu     sync.Mutex // held from fork to entry in live, and while reaping
	live   map[int]*child
	closed bool
	forked chan struct{} // wakes the reaper: there is something to wait for
	done   chan struct{}
	work   sync.WaitGroup
	tasks  int // that the user may have (RLIMIT_NPROC); 0: not limited here
	limit  int // processes of one call, or 0
	start  starter
}

// child is one process that was asked for, the leader of a session of its own.
type child struct {
	pid    int
	mark   string
	start  uint64
	over   chan struct{} // closed when the process was reaped
	status unix.WaitStatus
	mu     sync.Mutex
	reason string // why it was killed, if this program did it
}

var errClosed = errors.New("the tools worker is ending")

// watchEvery is how often the number of processes is looked at.
const watchEvery = 200 * time.Millisecond

func newChildren(tasks int, start starter) *children {
	k := &children{
		init: os.Getpid() == 1, live: map[int]*child{}, tasks: tasks, start: start,
		forked: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if k.init {
		k.work.Go(k.reap)
	}
	// A quarter is kept back, so that a call that runs away can be ended by another.
	k.limit = tasks * 3 / 4
	if k.limit > 0 && k.init {
		k.work.Go(k.watch)
	}
	return k
}

// begin starts a program. attr.Sys must make it the leader of a session.
func (k *children) begin(binary string, argv []string, attr *os.ProcAttr, mark string) (*child, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, errClosed
	}
	process, err := k.startLimited(binary, argv, attr)
	if err != nil {
		return nil, err
	}
	c := &child{pid: process.Pid, mark: mark, over: make(chan struct{})}
	if p, err := readProcess(c.pid); err == nil {
		c.start = p.start
	}
	giveWay(c.pid)
	process.Release()
	k.live[c.pid] = c
	if k.init {
		select {
		case k.forked <- struct{}{}:
		default:
		}
	} else {
		k.work.Go(func() {
			_ = await(unix.P_PID, c.pid)
			k.collect(c.pid)
		})
	}
	return c, nil
}

// giveWay makes a command what is ended where memory ends, before this program. For a moment in
// its start a process still counts as one that nobody may touch, as this one is.
func giveWay(pid int) {
	for range 50 {
		err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("500"), 0)
		if !errors.Is(err, unix.EACCES) {
			return
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// startLimited starts a program with a lower limit of tasks than this one's, a bound for the
// time that watch needs. It counts all of the user's: a fork bomb could take the last one
// else, and Go's runtime ends a program that cannot have another thread. What is started
// inherits the limit, so that it cannot be quicker than it.
func (k *children) startLimited(binary string, argv []string, attr *os.ProcAttr) (*os.Process, error) {
	var own unix.Rlimit
	if k.tasks == 0 || unix.Getrlimit(unix.RLIMIT_NPROC, &own) != nil {
		return k.start(binary, argv, attr)
	}
	most := min(uint64(max(1, k.tasks-spareThreads)), own.Cur)
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: most, Max: own.Max}); err != nil {
		return nil, err
	}
	process, err := k.start(binary, argv, attr)
	if e := unix.Setrlimit(unix.RLIMIT_NPROC, &own); err == nil && e != nil {
		process.Kill()
		return nil, e
	}
	if err == nil { // nor can it be raised again
		_ = unix.Prlimit(process.Pid, unix.RLIMIT_NPROC, &unix.Rlimit{Cur: most, Max: most}, nil)
	}
	return process, err
}

// reap is the one waiter of process 1.
func (k *children) reap() {
	for {
		if await(unix.P_ALL, 0) == nil {
			k.collect(-1)
			continue
		}
		select { // no child at all
		case <-k.forked:
		case <-k.done:
			return
		}
	}
}

// await returns when a child can be reaped, without reaping it: its number stays
// taken until collect holds the lock under which live is read.
func await(kind, pid int) error {
	for {
		if err := unix.Waitid(kind, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
			return err
		}
	}
}

func (k *children) collect(which int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var status unix.WaitStatus
	pid, err := unix.Wait4(which, &status, unix.WNOHANG, nil)
	if c := k.live[pid]; err == nil && c != nil {
		delete(k.live, pid)
		c.status = status
		close(c.over)
	}
}

// close kills whatever lives and returns when all of it has been reaped.
func (k *children) close() {
	k.mu.Lock()
	k.closed = true
	var left []*child
	for _, c := range k.live {
		left = append(left, c)
	}
	k.mu.Unlock()
	close(k.done)
	if k.init {
		k.closeNamespace()
		return
	}
	for _, c := range left {
		k.end(c, "the session ended")
	}
	k.work.Wait()
}

// closeNamespace kills all of this pid namespace but process 1, again and again
// until nothing is left: a kernel that kills one by one can miss what is being forked.
func (k *children) closeNamespace() {
	reaped := make(chan struct{})
	go func() {
		k.work.Wait()
		close(reaped)
	}()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		unix.Kill(-1, unix.SIGKILL)
		select {
		case <-reaped:
			return
		case <-ticker.C:
		}
	}
}

// end kills a child with everything it started and waits until it is reaped.
func (k *children) end(c *child, reason string) {
	k.kill(c, reason)
	<-c.over
	k.sweep(c)
}

// kill ends the child's process group at once. The kernel does it in one step,
// so that a group which forks is ended too.
func (k *children) kill(c *child, reason string) {
	c.mu.Lock()
	if c.reason == "" {
		c.reason = reason
	}
	c.mu.Unlock()
	k.signal(c, unix.SIGKILL)
}

// signal sends to the child's process group while its number is certain to be
// its own.
func (k *children) signal(c *child, sig unix.Signal) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.live[c.pid] == c {
		unix.Kill(-c.pid, sig)
	}
}

// killed says why the child was killed, or "".
func (c *child) killed() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason
}

// exit is the exit code as a shell gives it.
func (c *child) exit() int {
	if c.status.Signaled() {
		return 128 + int(c.status.Signal())
	}
	return c.status.ExitStatus()
}

// sweepDeadline bounds the hunt for what a call left behind.
const sweepDeadline = 3 * time.Second

// maxLooks is how often a process without any environment is looked at before it
// counts as one that has none: the kernel shows none while a program is being
// replaced (execve).
const maxLooks = 10

// sweep kills what belongs to a child that has ended, until nothing is found.
func (k *children) sweep(c *child) {
	deadline := time.Now().Add(sweepDeadline)
	// The group first, which needs no look at the process table: what forks faster
	// than a table is read is ended only so. Its number is not given away while it has members.
	// Zombies are members too, so it is not tried for ever.
	for range 50 {
		if unix.Kill(-c.pid, unix.SIGKILL) != nil {
			break
		}
		wait(time.Millisecond)
	}
	looks := map[process]int{}
	for pause := time.Millisecond; time.Now().Before(deadline); pause = min(2*pause, 20*time.Millisecond) {
		table, _ := processes(deadline)
		belongings, unsure := k.attribute(table, c, looks)
		if len(belongings[c]) == 0 && !unsure {
			return
		}
		for _, p := range belongings[c] {
			if p.session == c.pid {
				unix.Kill(-p.group, unix.SIGKILL) // in one step: it may be forking
			}
			p.kill()
		}
		wait(pause)
	}
}

func wait(d time.Duration) { <-time.NewTimer(d).C }

// process is one line of the process table.
type process struct {
	pid, parent, group, session int
	state                       byte
	start                       uint64 // clock ticks after boot
}

// attribute sorts the processes of a table by the call that they belong to: by
// session, by mark, or through their parent. ended is a call whose leader is gone
// already. As process 1, an orphan that nobody claims counts to ended: it has left
// its session and shed its mark, and lives on no longer than the next end of a
// call. unsure says that a process has to be looked at again. The table must have
// been read before, so that what begins in between is in neither.
func (k *children) attribute(table map[int]process, ended *child, looks map[process]int) (belongings map[*child][]process, unsure bool) {
	a := attribution{owners: map[int]*child{}, marks: map[string]*child{}, ended: ended, orphans: k.init, looks: looks}
	k.mu.Lock()
	for pid, c := range k.live {
		a.owners[pid], a.marks[c.mark] = c, c
	}
	k.mu.Unlock()
	if ended != nil {
		if _, taken := a.owners[ended.pid]; !taken {
			a.owners[ended.pid] = ended
		}
		a.marks[ended.mark] = ended
	}
	found := map[int]*child{}
	for _, p := range table {
		found[p.pid] = a.owner(p)
	}
	belongings = map[*child][]process{}
	for _, p := range table {
		at := p
		for found[at.pid] == nil && at.parent > 1 {
			next, ok := table[at.parent]
			if !ok || next.start > at.start {
				break
			}
			at = next
		}
		if c := found[at.pid]; c != nil && p.pid != os.Getpid() {
			belongings[c] = append(belongings[c], p)
		}
	}
	return belongings, a.unsure
}

type attribution struct {
	owners  map[int]*child // by session
	marks   map[string]*child
	ended   *child
	orphans bool // an orphan that nobody claims is ended's
	looks   map[process]int
	unsure  bool
}

func (a *attribution) owner(p process) *child {
	if p.pid == os.Getpid() {
		return nil
	}
	if c := a.owners[p.session]; c != nil && p.start >= c.start {
		return c
	}
	marked, bare := a.marked(p)
	if marked != nil || a.ended == nil {
		return marked
	}
	if bare && a.looks[p] < maxLooks {
		a.looks[p]++
		a.unsure = true
		return nil
	}
	if a.orphans && p.parent == 1 {
		return a.ended
	}
	return nil
}

// marked reads the mark in a process's environment, of those that began after
// the oldest call that matters. bare says that the environment is empty.
func (a *attribution) marked(p process) (c *child, bare bool) {
	candidate := false
	for _, c := range a.marks {
		candidate = candidate || p.start >= c.start
	}
	if !candidate {
		return nil, false
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
	if err != nil {
		return nil, false
	}
	for entry := range bytes.SplitSeq(environ, []byte{0}) {
		if value, ok := strings.CutPrefix(string(entry), callMark+"="); ok {
			return a.marks[value], false
		}
	}
	return nil, len(environ) == 0
}

// processes reads the process table, until a deadline; whole says whether it
// came to the end. What is dead but not reaped is left out. Where /proc shows another
// pid namespace it returns nothing, rather than numbers that mean someone else.
func processes(deadline time.Time) (table map[int]process, whole bool) {
	table = map[int]process{}
	if self, err := os.Readlink("/proc/self"); err != nil || self != strconv.Itoa(os.Getpid()) {
		return table, true
	}
	dir, err := os.Open("/proc")
	if err != nil {
		return table, true
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		if time.Now().After(deadline) {
			return table, false
		}
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, err := readProcess(pid); err == nil && p.state != 'Z' && p.state != 'X' {
			table[pid] = p
		}
	}
	return table, true
}

// readProcess parses /proc/PID/stat (proc(5)). The second field is the program's
// own name and may hold spaces and parentheses.
func readProcess(pid int) (process, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	_, rest, _ := strings.Cut(string(data[bytes.LastIndexByte(data, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return process{}, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	p := process{pid: pid, state: fields[0][0]}
	for i, into := range []*int{&p.parent, &p.group, &p.session} {
		if *into, err = strconv.Atoi(fields[1+i]); err != nil {
			return process{}, err
		}
	}
	const exiting = 0x4 // PF_EXITING of the kernel's sched.h: it runs no more of its program
	if flags, err := strconv.ParseUint(fields[6], 10, 32); err == nil && flags&exiting != 0 {
		p.state = 'X'
	}
	p.start, err = strconv.ParseUint(fields[19], 10, 64)
	return p, err
}

// kill ends exactly the process that was seen: a pid that was used again since
// has another start time.
func (p process) kill() {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil && err != unix.ENOSYS {
		return
	}
	if now, again := readProcess(p.pid); again != nil || now.start != p.start {
		if err == nil {
			unix.Close(fd)
		}
		return
	}
	if err == unix.ENOSYS { // gVisor
		unix.Kill(p.pid, unix.SIGKILL)
		return
	}
	unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	unix.Close(fd)
}

// spareThreads is how many tasks this program keeps for itself below the user's limit.
const spareThreads = 16

// reserveThreads makes the runtime have n threads that do nothing. It never gives a
// thread back, so they are there when no new one is to be had, as while startLimited
// has lowered the limit.
func reserveThreads(n int) {
	var made sync.WaitGroup
	made.Add(n)
	release := make(chan struct{})
	for range n {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			made.Done()
			<-release
		}()
	}
	made.Wait()
	close(release)
}

// watch ends a call that has more than limit processes. It is the only limit
// where the kernel does not keep RLIMIT_NPROC. It runs as process 1 only: there all
// processes are this program's.
//
// A fork bomb leaves so little time to everybody else that the process table
// cannot be read to its end any more. So the fullest call is noted while that is
// still possible, and is ended when it is not.
func (k *children) watch() {
	var fullest *child
	reserve := sync.OnceFunc(func() { reserveThreads(spareThreads / 2) })
	for pace := watchEvery; ; {
		timer := time.NewTimer(pace)
		select {
		case <-k.done:
			timer.Stop()
			return
		case <-timer.C:
		}
		k.mu.Lock()
		busy := len(k.live) > 0
		k.mu.Unlock()
		if busy { // a command that ends at once does not pay for it
			reserve()
		}
		names, err := os.ReadDir("/proc")
		if pace = watchEvery; err != nil || len(names) <= k.limit/4 {
			continue // the usual case costs one look
		}
		pace = watchEvery / 8
		table, whole := processes(time.Now().Add(watchEvery))
		belongings, _ := k.attribute(table, nil, nil)
		most := 0
		for c, list := range belongings {
			if len(list) > most && (whole || fullest == nil) {
				fullest, most = c, len(list)
			}
		}
		if over := most > k.limit || !whole && len(names) > k.limit; over && fullest != nil {
			k.kill(fullest, fmt.Sprintf("it had about %d processes, at most %d are allowed", max(most, len(names)), k.limit))
			fullest = nil // what is left of it goes when its end is noticed
		}
	}
}
