package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cal/internal/testenv/vm"
	"cal/wire"
)

// TestEntropyBeforeOK: on each wire the kernel is given that greeting's bytes, counted in full, then told to
// begin anew from them, and only then the host hears ok. What the kernel is asked is seen where it is asked.
func TestEntropyBeforeOK(t *testing.T) {
	f := &first{prepared: true, random: addEntropy}
	for n := range 2 { // a first wire and a later one, or that of a twin
		kernel, host := newWitness(t), make(chan error, 1)
		ours, guest := net.Pipe()
		go func() {
			_, err := wire.Greet(ours, time.Now().Add(vm.Patience))
			host <- err
		}()
		var g wire.Greeting
		err := kernel.watch(func() error {
			var err error
			g, err = f.answer(kernel.hears(guest))
			return err
		})
		if err := errors.Join(err, <-host); err != nil {
			t.Fatal(err)
		}
		if want := []string{fmt.Sprintf("add 512 bits: %x", g.Entropy), "reseed", "ok"}; !slices.Equal(kernel.log(), want) {
			t.Errorf("wire %d: the machine does\n%s\nwant\n%s", n, strings.Join(kernel.log(), "\n"), strings.Join(want, "\n"))
		}
	}
}

// TestEntropyRefused: a kernel that does not take the bytes, or does not begin anew, serves nobody.
func TestEntropyRefused(t *testing.T) {
	for what, request := range map[string]uint32{"adding entropy": unix.RNDADDENTROPY, "reseeding the random numbers": unix.RNDRESEEDCRNG} {
		kernel, host := newWitness(t), make(chan error, 1)
		kernel.refuses = request
		ours, guest := net.Pipe()
		go func() {
			_, err := wire.Greet(ours, time.Now().Add(vm.Patience))
			host <- err
		}()
		f := &first{prepared: true, random: addEntropy}
		want := what + ": operation not permitted"
		if err := kernel.watch(func() error { _, err := f.answer(kernel.hears(guest)); return err }); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("machine: %v, want %q", err, want)
		}
		if err := <-host; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("host: %v, want %q", err, want)
		}
		if slices.Contains(kernel.log(), "ok") {
			t.Errorf("%s fails, and the machine says ok", what)
		}
	}
}

// witness stands between a thread and the kernel's random numbers, and writes down what it is asked. The
// kernel itself is not: that would count bytes that this test knows.
type witness struct {
	t       *testing.T
	refuses uint32

	mu  sync.Mutex
	saw []string
}

func newWitness(t *testing.T) *witness { return &witness{t: t} }

func (w *witness) write(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.saw = append(w.saw, what)
}

func (w *witness) forget(after int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.saw = w.saw[:after]
}

func (w *witness) log() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.saw)
}

// hears writes down when ok is said.
func (w *witness) hears(conn io.ReadWriter) io.ReadWriter {
	return struct {
		io.Reader
		io.Writer
	}{conn, writer(func(p []byte) (int, error) {
		if bytes.HasSuffix(p, []byte(" ok\n")) {
			w.write("ok")
		}
		return conn.Write(p)
	})}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

var errNoWitness = errors.New("the kernel hands over no system calls (seccomp_unotify)")

// watch does what is watched in a thread of its own.
func (w *witness) watch(do func() error) error {
	ready, over := make(chan int), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the filter goes with the thread
		fd, err := askFirst(unix.RNDADDENTROPY, unix.RNDRESEEDCRNG)
		if err != nil {
			over <- fmt.Errorf("%w: %w", errNoWitness, err)
			close(ready)
			return
		}
		ready <- fd
		over <- do()
	}()
	fd, ok := <-ready
	if !ok {
		err := <-over
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EBUSY) { // before Linux 5.0, or in a container that has a witness of its own
			w.t.Skip(err)
		}
		return err
	}
	defer unix.Close(fd)
	stopped, stop, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stopped.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.answer(fd, int(stopped.Fd()))
	}()
	err = <-over
	stop.Close()
	<-ended
	return err
}

// The kernel's struct seccomp_notif and its answer, see seccomp_unotify(2).
type (
	notice struct {
		id         uint64
		pid, flags uint32
		call       int32
		arch       uint32
		at         uint64
		args       [6]uint64
	}
	verdict struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

func (w *witness) answer(fd, stopped int) {
	for {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stopped), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); err != nil && err != unix.EINTR {
			w.t.Error(err)
			return
		}
		if poll[1].Revents != 0 {
			return
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			continue
		}
		var n notice
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n))); errno != 0 {
			continue // a signal was there first, and it is asked again
		}
		says, before := verdict{id: n.id}, len(w.log())
		switch request := uint32(n.args[1]); request {
		case w.refuses:
			says.errno = -int32(unix.EPERM)
		case unix.RNDADDENTROPY:
			w.write(poolInfo(int64(n.args[2])))
		case unix.RNDRESEEDCRNG:
			w.write("reseed")
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&says))); errno == unix.ENOENT {
			w.forget(before) // a signal interrupted the call, which is made again
		} else if errno != 0 {
			w.t.Error(errno)
		}
	}
}

// poolInfo reads a struct rand_pool_info of this process.
func poolInfo(at int64) string {
	memory, err := os.Open("/proc/self/mem")
	if err != nil {
		return err.Error()
	}
	defer memory.Close()
	head := make([]byte, 8)
	if _, err := memory.ReadAt(head, at); err != nil {
		return err.Error()
	}
	bits, size := binary.NativeEndian.Uint32(head), binary.NativeEndian.Uint32(head[4:])
	data := make([]byte, min(size, 1024))
	if _, err := memory.ReadAt(data, at+8); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("add %d bits: %x", bits, data)
}

// askFirst puts a filter on the thread: two requests of ioctl are another's to answer, who has the
// descriptor.
func askFirst(requests ...uint32) (int, error) {
	const number, request = 0, 24 // in struct seccomp_data: the call, and the low half of its second argument
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	equal := func(value uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: yes, Jf: no, K: value}
	}
	filter := []unix.SockFilter{
		load(number), equal(unix.SYS_IOCTL, 0, 3), load(request), equal(requests[0], 2, 0), equal(requests[1], 1, 0),
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}, {Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, err
	}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// ways to take entropy: the product's, and those that leave something out.
var ways = map[string]struct {
	take     func([]byte) error
	inCommon int // on how many processors twins then go on alike
}{
	"as it is":          {addEntropy, 0},
	"nothing is taken":  {func([]byte) error { return nil }, processors},
	"without beginning": {addOnly, processors},
}

// addOnly leaves it to the kernel when it takes up what was added.
func addOnly(entropy []byte) error {
	pool, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer pool.Close()
	return creditEntropy(pool, entropy)
}

// drawn asks a machine for random numbers.
func drawn(t *testing.T, m *vm.Machine, way string) string {
	t.Helper()
	return asked(t, m, "draw "+way, "random ")
}

// drawnAtOK greets, and returns what the machine drew when it said ok.
func drawnAtOK(t *testing.T, m *vm.Machine) string {
	t.Helper()
	conn := &read{Conn: m.Dial("cal.wire")}
	if _, err := wire.Greet(conn, time.Now().Add(vm.Patience)); err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`random (\S+)\n\ncal-wire 1 \S+ ok\n`).FindSubmatch(conn.all)
	if found == nil {
		t.Fatalf("the machine says %q", conn.all)
	}
	return string(found[1])
}

type read struct {
	net.Conn
	all []byte
}

func (r *read) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.all = append(r.all, p[:n]...)
	return n, err
}

// TestTwins: two machines that go on from one memory draw the same random numbers, the control, until they are
// greeted: from ok on they have nothing in common, and owe that to the greeting alone.
func TestTwins(t *testing.T) {
	config := remembered(t)
	for way, want := range ways {
		t.Run(way, func(t *testing.T) {
			for left := 4; ; left-- {
				before, after := twins(t, config, way)
				if inCommon(before) == processors && inCommon(after) == want.inCommon {
					break
				}
				// On a busy host the kernel began anew by itself, which makes twins differ.
				if itself := inCommon(before) < processors || want.inCommon > inCommon(after); itself && left > 0 {
					t.Logf("again: asked they draw %q, greeted %q", before, after)
					continue
				}
				t.Fatalf("asked they draw %q, and greeted %q: want that they are alike first, and then on %d of %d processors", before, after, want.inCommon, processors)
			}
		})
	}
}

// inCommon is on how many processors two machines drew the same.
func inCommon(drawn [2]string) (n int) {
	of := func(text string, cpu int) map[string]bool {
		all := map[string]bool{}
		for i := range draws {
			all[text[2*drawSize*(cpu*draws+i):][:2*drawSize]] = true
		}
		return all
	}
	for cpu := range processors {
		other := of(drawn[1], cpu)
		for value := range of(drawn[0], cpu) {
			if other[value] {
				n++
				break
			}
		}
	}
	return n
}

// twins are what two machines of one memory draw when they are asked, and when they say ok.
func twins(t *testing.T, config vm.Config, way string) (before, after [2]string) {
	t.Helper()
	for i := range before {
		twin := vm.Start(t, config)
		before[i], after[i] = drawn(t, twin, way), drawnAtOK(t, twin)
		twin.Kill()
	}
	return before, after
}
