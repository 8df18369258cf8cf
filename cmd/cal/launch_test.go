package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// TestCreatePodCalledOff interrupts the start of a machine at its two ends: before the node
// answers, and when it has answered already. Both times the pod is ended by its ref.
func TestCreatePodCalledOff(t *testing.T) {
	for name, late := range map[string]bool{"before the answer": false, "with the answer on its way": true} {
		t.Run(name, func(t *testing.T) {
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			var mu sync.Mutex
			var made, ended []string
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				switch r.Method {
				case http.MethodPost:
					var spec nucleus.PodSpec
					if err := json.NewDecoder(r.Body).Decode(&spec); err != nil {
						t.Error(err)
					}
					made = append(made, spec.Ref)
					if late {
						io.WriteString(w, `{"id": "p-1", `) // the rest is still on its way
						w.(http.Flusher).Flush()
					}
					interrupt()
				case http.MethodDelete:
					ended = append(ended, filepath.Base(r.URL.Path))
					if !late { // it came to nothing
						wire.WriteError(w, nucleus.Errorf(nucleus.KindNotFound, "no pod"))
						return
					}
					w.WriteHeader(http.StatusNoContent)
				}
			})}
			go server.Serve(l)
			defer server.Close()
			_, key, err := ed25519.GenerateKey(nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := createPod(ctx, client.New(socket, "operator", key), nucleus.PodSpec{}); !errors.Is(err, context.Canceled) {
				t.Errorf("%v, want that it was called off", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if len(made) != 1 || len(ended) != 1 || made[0] == "" || made[0] != ended[0] {
				t.Errorf("made %q, ended %q", made, ended)
			}
		})
	}
}

// TestReadLine leaves what stands behind the line to the agent.
func TestReadLine(t *testing.T) {
	in := strings.NewReader("q\nfor the agent")
	if line := readLine(iotest.OneByteReader(in)); line != "q\n" {
		t.Errorf("read %q", line)
	}
	if rest := in.Len(); rest != len("for the agent") {
		t.Errorf("%d bytes are left", rest)
	}
	for text, want := range map[string]string{"": "", "\n": "\n", "no end": "no end", strings.Repeat("x", 5000): strings.Repeat("x", 1024)} {
		if got := readLine(strings.NewReader(text)); got != want {
			t.Errorf("of %.20q: %.20q, want %.20q", text, got, want)
		}
	}
}

func TestHarmless(t *testing.T) {
	for text, want := range map[string]string{
		"no such file: sch\u00f6n.txt\n\thint": "no such file: sch\u00f6n.txt\n  \thint", "gone\ncal: forged": "gone\n  cal: forged", "\x1b]0;owned\a": `\u{1b}]0;owned\u{7}`, "a\u202eb\u009b2J\r": `a\u{202e}b\u{9b}2J\u{d}`, "\xff": "\ufffd",
	} {
		if got := harmless(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}
