package qemu

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {}, "capabilities": []}}` + "\n"

// peer is the other end of a monitor's connection: it says what it is told, line by line,
// one for each that it hears.
func peer(t *testing.T, first string, answers ...string) net.Conn {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	go func() {
		if _, err := io.WriteString(theirs, first); err != nil {
			return
		}
		buffer := make([]byte, 4096)
		for _, answer := range answers {
			if _, err := theirs.Read(buffer); err != nil {
				return
			}
			if _, err := io.WriteString(theirs, answer); err != nil {
				return
			}
		}
		io.Copy(io.Discard, theirs)
	}()
	return ours
}

func TestMonitor(t *testing.T) {
	m, err := converse(t.Context(), peer(t, greeting, "{\"return\": {}}\n", "{\"event\": \"RESUME\", \"timestamp\": {\"seconds\": 1}}\n{\"return\": {}}\n", `{"error": {"class": "GenericError", "desc": "no\u0007\n"}}`+"\n",
		`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`+"\n{\"return\": {}}\n"))
	must(t, err)
	defer m.close()
	must(t, m.do(t.Context(), "cont"))
	if err := m.do(t.Context(), "stop"); err == nil || !strings.HasSuffix(err.Error(), "stop: no??") {
		t.Errorf("an error of QEMU's: %q", err)
	}
	if m.ended() != "" {
		t.Errorf("ended: %q", m.ended())
	}
	must(t, m.do(t.Context(), "cont"))
	if m.ended() != "SHUTDOWN guest-reset" {
		t.Errorf("ended: %q", m.ended())
	}
}

// TestHostileMonitor: who took over QEMU gets no more than an error out of the host.
func TestHostileMonitor(t *testing.T) {
	flood := strings.Repeat(`{"event": "NOISE"}`+"\n", 10000)
	for name, test := range map[string]struct {
		first   string
		answers []string
		want    string // of the error; "": none
	}{
		"nothing said":        {first: "", want: "the greeting"},
		"no JSON":             {first: "hello\n", want: "the greeting"},
		"a long line":         {first: strings.Repeat("x", 2*longestAnswer), want: "the greeting"},
		"an endless greeting": {first: `{"QMP": "` + strings.Repeat("x", 2*longestAnswer), want: "the greeting"},
		"another greeting":    {first: `{"return": {}}` + "\n", want: "something else"},
		"two greetings":       {first: greeting, answers: []string{greeting}, want: "something else"},
		"an error":            {first: greeting, answers: []string{`{"error": {"desc": "` + strings.Repeat("e", 5000) + `"}}` + "\n"}, want: "qmp_capabilities: eeee"},
		"a flood of events":   {first: flood + greeting, answers: []string{flood + "{\"return\": {}}\n"}},
		"silence":             {first: greeting, answers: []string{""}, want: "qmp_capabilities"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			m, err := converse(ctx, peer(t, test.first, test.answers...))
			if err == nil {
				m.close()
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

// TestMonitorGone: a QEMU that ends is no answer, and keeps nobody waiting.
func TestMonitorGone(t *testing.T) {
	ours, theirs := net.Pipe()
	go func() {
		io.WriteString(theirs, greeting)
		theirs.Read(make([]byte, 100))
		theirs.Close()
	}()
	began := time.Now()
	if _, err := converse(t.Context(), ours); err == nil || time.Since(began) > answerPatience/2 {
		t.Errorf("%v after %s", err, time.Since(began))
	}
}
