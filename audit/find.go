package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/url"
	"strings"
	"time"

	"cal/internal/durable"
	"cal/nucleus"
)

// Filter selects entries. A field that is empty selects all; the others must all fit. The
// texts are compared whole; a Kind that ends with "*" stands for all that begin like it.
type Filter struct {
	Pod, Session, Actor, Kind string
	Op                        nucleus.Op
	Verdict                   nucleus.Verdict

	// Host is one that the entry names as a place on the network, in lower case.
	Host string

	// Since and Until bound the time: Since <= time < Until.
	Since, Until time.Time
}

// Find yields the entries from the sequence number on that a filter selects, as they are
// stored. It reads as ReadRaw does, and is made for logs of millions of entries: what is
// not selected is hardly looked at.
func Find(dir string, from int64, f Filter) iter.Seq2[[]byte, error] {
	selects := f.compile()
	return func(yield func([]byte, error) bool) {
		for raw, err := range ReadRaw(dir, from) {
			if err != nil {
				yield(nil, err)
				return
			}
			if selects(raw) && !yield(raw, nil) {
				return
			}
		}
	}
}

// Tail is Find that goes on with what is appended, until ctx ends. It looks for news at
// every interval.
func Tail(ctx context.Context, dir string, from int64, f Filter, every time.Duration) iter.Seq2[[]byte, error] {
	selects := f.compile()
	return func(yield func([]byte, error) bool) {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for at := from; ; {
			for raw, err := range ReadRaw(dir, at) {
				if err != nil {
					yield(nil, err)
					return
				}
				at++
				if selects(raw) && !yield(raw, nil) {
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}
}

// compile makes the test of a filter. An entry is canonical JSON, which has one spelling
// of each member, so most are sorted out by the absence of a text; the rest is looked
// into.
func (f Filter) compile() func(raw []byte) bool {
	members := map[string][]byte{} // by key: the value as it is stored
	for key, value := range map[string]string{
		"pod": f.Pod, "session": f.Session, "actor": f.Actor, "kind": f.Kind, "op": string(f.Op), "decision": string(f.Verdict),
	} {
		if value != "" {
			members[key] = spelled(value)
		}
	}
	prefix := ""
	if kind, ok := strings.CutSuffix(f.Kind, "*"); ok {
		delete(members, "kind")
		prefix = kind
	}
	var needles [][]byte
	for key, value := range members {
		needles = append(needles, []byte(`"`+key+`":`+string(value)))
	}
	if f.Host != "" {
		needles = append(needles, []byte(f.Host))
	}
	return func(raw []byte) bool {
		for _, needle := range needles {
			if !bytes.Contains(raw, needle) {
				return false
			}
		}
		return hasMembers(raw, members) && strings.HasPrefix(textOf(raw, "kind"), prefix) && f.inTime(raw) && (f.Host == "" || namesHost(raw, f.Host))
	}
}

// spelled is a text as canonical JSON; of one that is not UTF-8, what no entry has.
func spelled(text string) []byte {
	raw, err := nucleus.Canonical(text)
	if err != nil {
		return []byte{0}
	}
	return raw
}

func hasMembers(raw []byte, members map[string][]byte) bool {
	for key, want := range members {
		if got, ok := memberOf(raw, key); !ok || !bytes.Equal(got, want) {
			return false
		}
	}
	return true
}

// memberOf is the value of a top-level member as it is stored.
func memberOf(raw []byte, key string) (value []byte, ok bool) {
	if len(raw) < 2 || raw[0] != '{' {
		return nil, false
	}
	for at := 1; at < len(raw)-1; at++ {
		name, after, ok := jsonString(raw, at)
		if !ok || after >= len(raw) || raw[after] != ':' {
			return nil, false
		}
		end := skipValue(raw, after+1)
		if end < 0 {
			return nil, false
		}
		if string(name) == key {
			return raw[after+1 : end], true
		}
		at = end
	}
	return nil, false
}

func textOf(raw []byte, key string) string {
	value, _ := memberOf(raw, key)
	return strings.Trim(string(value), `"`)
}

func (f Filter) inTime(raw []byte) bool {
	if f.Since.IsZero() && f.Until.IsZero() {
		return true
	}
	at, err := time.Parse(time.RFC3339Nano, timeOf(raw))
	return err == nil && !at.Before(f.Since) && (f.Until.IsZero() || at.Before(f.Until))
}

// timeOf is the time of an entry, which is its last member in canonical JSON.
func timeOf(raw []byte) string {
	const key = `"time":"`
	if at := bytes.LastIndex(raw, []byte(key)); at >= 0 && len(raw)-at < 64 {
		return strings.TrimSuffix(string(raw[at+len(key):]), `"}`)
	}
	return textOf(raw, "time")
}

// namesHost reports whether an entry is about a host: one that it connects to, fetches
// from, pushes to, calls a model at.
func namesHost(raw []byte, host string) bool {
	var e struct {
		Args struct {
			Connect, Fetch struct{ Host string }
			Push           struct{ Remote string }
			PR             struct{ API string }
			Host           string // of an attempt
		}
		Data struct{ Host string }
	}
	if json.Unmarshal(raw, &e) != nil {
		// Arguments need not be an object.
		var d struct{ Data struct{ Host string } }
		return json.Unmarshal(raw, &d) == nil && d.Data.Host == host
	}
	for _, name := range []string{e.Args.Connect.Host, e.Args.Fetch.Host, e.Args.Host, e.Data.Host, hostOf(e.Args.Push.Remote), hostOf(e.Args.PR.API)} {
		if name == host {
			return true
		}
	}
	return false
}

func hostOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	return strings.ToLower(u.Hostname())
}

// ParseEntry decodes the stored bytes of an entry.
func ParseEntry(raw []byte) (nucleus.Entry, error) {
	e, err := decode(raw)
	if err != nil {
		err = fmt.Errorf("log entry %.60q: %w", raw, err)
	}
	return e, err
}

// Seq is the sequence number in the stored bytes of an entry.
func Seq(raw []byte) (seq int64, ok bool) {
	g, err := look(raw)
	return g.seq, err == nil
}

// Newest is the newest signed checkpoint of a log and the number of entries under it. The
// signature is not checked.
func Newest(dir string) (signed []byte, size int64, err error) {
	d, err := durable.OpenDir(dir)
	if err != nil {
		return nil, 0, err
	}
	defer d.Close()
	j, err := readJournal(d)
	if err != nil {
		return nil, 0, fmt.Errorf("log %s: %w", dir, err)
	}
	return j.newest(), j.end(), nil
}
