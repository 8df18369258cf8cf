package guest

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cal/nucleus"
	"cal/wire"
)

const patience = 15 * time.Second

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// sessions are both ends of a wire.
func sessions(t testing.TB) (node, machine *wire.Session) {
	t.Helper()
	a, b := net.Pipe()
	node, err := wire.Host(a)
	if err != nil {
		t.Fatal(err)
	}
	if machine, err = wire.Guest(b); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close(); machine.Close() })
	return node, machine
}

// A boot frame is the first stream or there is none.
func TestReceiveBoot(t *testing.T) {
	public, _ := newKey(t)
	config := Config{ToolsUID: 1000, ToolsGID: 1000, AgentUID: 1001, AgentGID: 1001, Mode: nucleus.Mediated}
	good := func() map[string]any {
		return map[string]any{"pod": "p-1", "boot": "b-1", "node_key": []byte(public), "policy": json.RawMessage(lockPolicy), "time": nucleus.NodeTime{Epoch: 1, UnixMilli: 1}, "guest": config}
	}
	for name, c := range map[string]struct {
		kind   string
		change func(map[string]any)
		text   string
	}{
		"good":             {StreamBoot, func(map[string]any) {}, ""},
		"another stream":   {StreamCall, func(map[string]any) {}, "first stream"},
		"no pod":           {StreamBoot, func(m map[string]any) { m["pod"] = "" }, "lacks"},
		"no boot":          {StreamBoot, func(m map[string]any) { m["boot"] = "" }, "lacks"},
		"half a key":       {StreamBoot, func(m map[string]any) { m["node_key"] = []byte(public[:31]) }, "lacks"},
		"an unknown field": {StreamBoot, func(m map[string]any) { m["network"] = true }, "unknown field"},
		"no policy":        {StreamBoot, func(m map[string]any) { m["policy"] = nil }, ""},
		"a bad policy": {StreamBoot, func(m map[string]any) {
			m["policy"] = map[string]any{"operations": map[string]any{"execute": "always"}}
		}, "execute"},
		"agent is root":  {StreamBoot, func(m map[string]any) { c := config; c.AgentUID = 0; m["guest"] = c }, "agent uid"},
		"agent is tools": {StreamBoot, func(m map[string]any) { c := config; c.AgentUID = 1000; m["guest"] = c }, "agent uid"},
		"unknown mode":   {StreamBoot, func(m map[string]any) { c := config; c.Mode = "open"; m["guest"] = c }, "mode"},
		"a layer of the host": {StreamBoot, func(m map[string]any) {
			c := config
			c.Layers = []AgentLayer{{"/etc", "/etc"}}
			m["guest"] = c
		}, "layer"},
		"a layer above the root": {StreamBoot, func(m map[string]any) {
			c := config
			c.Layers = []AgentLayer{{nucleus.MachineAgent + "/0", "/usr/../../etc"}}
			m["guest"] = c
		}, "layer"},
	} {
		t.Run(name, func(t *testing.T) {
			node, machine := sessions(t)
			boot := good()
			c.change(boot)
			go func() {
				stream, err := node.Open(deadline(t), c.kind, nil)
				if err == nil {
					stream.SendJSON(wire.FrameJSON, boot)
				}
			}()
			p, _, err := receiveBoot(machine)
			if name == "no policy" {
				// Nothing is allowed, or it is refused; either is safe.
				if err == nil && p.policy.Decide(readAction("a"), nucleus.Context{}).Verdict != nucleus.Deny {
					t.Error("no policy allows")
				}
				return
			}
			if c.text == "" && (err != nil || len(p.key) != ed25519.PrivateKeySize) {
				t.Fatalf("refused: %v", err)
			}
			if c.text != "" && (err == nil || !strings.Contains(err.Error(), c.text)) {
				t.Errorf("got %v, want %q", err, c.text)
			}
		})
	}
}

// door is a proxy whose wire can be replaced, and the two ends of its door.
func door(t testing.TB, l *lock) (old *wire.Session, outside *net.UnixConn, result chan error) {
	t.Helper()
	node, machine := sessions(t)
	l.p.session = machine
	path := filepath.Join(t.TempDir(), "d")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	inside, err := listener.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); inside.Close() })
	result = make(chan error, 1)
	go func() { result <- l.p.attach(inside) }()
	return node, conn.(*net.UnixConn), result
}

// A new wire is taken from who proves the node key of the boot, and from nobody else:
// the old one stays in every other case.
func TestAttach(t *testing.T) {
	_, stranger := newKey(t)
	for name, c := range map[string]struct {
		prove func(l *lock, want AttachProof) nucleus.Signed
		text  string
	}{
		"the node": {func(l *lock, want AttachProof) nucleus.Signed {
			want.Time = nucleus.NodeTime{Epoch: 2}
			return must(nucleus.Sign(l.node, nucleus.DomainAttach, want))
		}, ""},
		"another key": {func(_ *lock, want AttachProof) nucleus.Signed {
			return must(nucleus.Sign(stranger, nucleus.DomainAttach, want))
		}, "bad signature"},
		"the outcome key": {func(l *lock, want AttachProof) nucleus.Signed {
			return must(nucleus.Sign(l.p.key, nucleus.DomainAttach, want))
		}, "bad signature"},
		"another domain": {func(l *lock, want AttachProof) nucleus.Signed {
			return must(nucleus.Sign(l.node, nucleus.DomainPermit, want))
		}, "bad signature"},
		"another nonce": {func(l *lock, want AttachProof) nucleus.Signed {
			want.Nonce += "x"
			return must(nucleus.Sign(l.node, nucleus.DomainAttach, want))
		}, "another boot or nonce"},
		"another boot": {func(l *lock, want AttachProof) nucleus.Signed {
			want.Boot = "b-2"
			return must(nucleus.Sign(l.node, nucleus.DomainAttach, want))
		}, "another boot or nonce"},
		"a node of before": {func(l *lock, want AttachProof) nucleus.Signed {
			want.Time = nucleus.NodeTime{Epoch: 0}
			return must(nucleus.Sign(l.node, nucleus.DomainAttach, want))
		}, "epoch 0"},
		"nothing": {func(*lock, AttachProof) nucleus.Signed { return nucleus.Signed{} }, "bad signature"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLock(t)
			old, outside, result := door(t, l)
			before, changed := l.p.current()
			ours, theirs, err := socketPair()
			if err != nil {
				t.Fatal(err)
			}
			if err := sendFiles(outside, "wire", []*os.File{theirs}); err != nil {
				t.Fatal(err)
			}
			theirs.Close()
			node, err := wire.Host(ours)
			if err != nil {
				t.Fatal(err)
			}
			defer node.Close()
			stream, err := node.Accept()
			if err != nil {
				t.Fatal(err)
			}
			var want AttachProof
			if err := nucleus.Strict(stream.Header, &want); err != nil || stream.Kind != StreamProof || want.Boot != "b-1" || len(want.Nonce) < 20 {
				t.Fatalf("asked for %s %+v, %v", stream.Kind, want, err)
			}
			stream.SendJSON(wire.FrameJSON, c.prove(l, want))
			err = <-result
			now, _ := l.p.current()
			if c.text != "" {
				if err == nil || !strings.Contains(err.Error(), c.text) {
					t.Errorf("got %v, want %q", err, c.text)
				}
				if now != before || old.Err() != nil {
					t.Error("the old wire is gone")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if now == before {
				t.Error("the old wire stayed")
			}
			select {
			case <-changed:
			default:
				t.Error("nobody was told")
			}
			<-old.Done()
		})
	}
}

func must(s nucleus.Signed, err error) nucleus.Signed {
	if err != nil {
		panic(err)
	}
	return s
}

// What comes through the door with another number of descriptors than one is no wire,
// and leaves none open.
func TestAttachDescriptors(t *testing.T) {
	for _, n := range []int{0, 2, 16} {
		l := newLock(t)
		_, outside, result := door(t, l)
		var files []*os.File
		for range n {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			files = append(files, w)
		}
		if err := sendFiles(outside, "wire", files); err != nil {
			t.Fatal(err)
		}
		if err := <-result; err == nil || !strings.Contains(err.Error(), "want the wire alone") {
			t.Errorf("%d descriptors: %v", n, err)
		}
		for _, f := range files {
			f.Close()
		}
	}
	l := newLock(t)
	_, outside, result := door(t, l)
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := sendFiles(outside, "wire", []*os.File{file}); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err == nil {
		t.Error("a file that is no socket was taken for a wire")
	}
	_, outside, result = door(t, newLock(t))
	outside.Close()
	if err := <-result; err == nil {
		t.Error("nobody was taken for a wire")
	}
}

// Descriptors that are not wanted are closed.
func TestAttachClosesDescriptors(t *testing.T) {
	l := newLock(t)
	_, outside, result := door(t, l)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := sendFiles(outside, "wire", []*os.File{w, w}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := <-result; err == nil {
		t.Error("two descriptors were taken")
	}
	r.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := r.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the pipe's other end is still open in the proxy")
	}
}

func TestFilesPass(t *testing.T) {
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	conn, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var files []*os.File
	for range maxPassed {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		files = append(files, w)
	}
	if err := sendFiles(ours, "ok", files); err != nil {
		t.Fatal(err)
	}
	text, got, err := recvFiles(conn.(*net.UnixConn))
	if err != nil || text != "ok" || len(got) != maxPassed {
		t.Fatalf("%q, %d, %v", text, len(got), err)
	}
	for _, f := range append(got, files...) {
		f.Close()
	}
	if err := sendFiles(ours, "", nil); err != nil {
		t.Fatal(err)
	}
	if text, got, err := recvFiles(conn.(*net.UnixConn)); err != nil || text == "" || got != nil {
		t.Errorf("%q, %v, %v", text, got, err)
	}
}

func TestBlock(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go writeBlock(a, []byte("plan"))
	if got, err := readBlock(b, 16); err != nil || string(got) != "plan" {
		t.Errorf("%q, %v", got, err)
	}
	go a.Write([]byte{0xff, 0xff, 0xff, 0xff})
	if _, err := readBlock(b, 16); err == nil || !strings.Contains(err.Error(), "at most 16") {
		t.Errorf("got %v", err)
	}
}

// The DNS stub answers whatever comes, or nothing, and goes on.
func FuzzNXDOMAIN(f *testing.F) {
	question := append([]byte{0x12, 0x34, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0}, "\x07example\x03org\x00\x00\x01\x00\x01"...)
	f.Add(question)
	f.Add(question[:12])
	f.Add(question[:20])
	f.Add(append(append([]byte{}, question[:12]...), 0xc0, 0x0c, 0, 1, 0, 1))
	f.Add(append(append([]byte{}, question[:12]...), 63))
	f.Add([]byte{})
	stub, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); answerNXDOMAIN(stub) }()
	f.Cleanup(func() { stub.Close(); <-done })
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1400 {
			return
		}
		conn, err := net.Dial("udp4", stub.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		conn.Write(data)
		conn.Write(question) // is always answered
		buf := make([]byte, 2000)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("% x: %v", data, err)
		}
		if n < 12 || buf[2]&0x80 == 0 || buf[3]&0x0f != 3 || buf[6]|buf[7]|buf[8]|buf[9]|buf[10]|buf[11] != 0 {
			t.Errorf("answer % x", buf[:n])
		}
		if n > max(len(data), len(question)) {
			t.Errorf("an answer of %d bytes to %d: it makes more of less", n, len(data))
		}
	})
}

// A stream of a kind that the proxy does not know is closed, and a call that makes no
// sense gets an answer.
func TestStrangeStreams(t *testing.T) {
	l := newLock(t)
	node, machine := sessions(t)
	l.p.session = machine
	served := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { served <- l.p.serve(ctx) }()
	defer func() { cancel(); node.Close(); <-served }()
	for kind, header := range map[string]any{"shell": nil, StreamCall: map[string]any{"op": "execute"}, StreamBoot: nil} {
		stream, err := node.Open(deadline(t), kind, header)
		if err != nil {
			t.Fatal(err)
		}
		stream.SetDeadline(time.Now().Add(patience))
		frame, payload, err := stream.Recv(1 << 20)
		if kind != StreamCall {
			if err == nil {
				t.Errorf("%s: frame %q", kind, frame)
			}
			continue
		}
		var result CallResult
		if err != nil || json.Unmarshal(payload, &result) != nil || result.Error == nil || result.Error.Kind != nucleus.KindInvalid {
			t.Errorf("%s: %s, %v", kind, payload, err)
		}
	}
	// A call without a permit is refused, and the refusal is signed.
	action := readAction("a")
	stream, err := node.Open(deadline(t), StreamCall, Call{Op: nucleus.ReadFiles})
	if err != nil {
		t.Fatal(err)
	}
	stream.SetDeadline(time.Now().Add(patience))
	stream.SendJSON(wire.FrameJSON, map[string]any{"args": map[string]any{}, "action": action})
	var result CallResult
	if err := stream.RecvJSON(wire.FrameResult, 1<<20, &result); err != nil {
		t.Fatal(err)
	}
	if result.Error == nil || result.Error.Kind != nucleus.KindForbidden || result.Outcome == nil {
		t.Errorf("got %+v", result)
	}
}
