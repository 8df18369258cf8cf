package nucleus

import (
	"encoding/json"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// Every member of an action that is the digest of a content is left out of what is shown, and
// can be put back. The members are found by their names, so that none can be forgotten.
func TestActionShown(t *testing.T) {
	n := 0
	var fill func(v reflect.Value, name string)
	fill = func(v reflect.Value, name string) {
		switch v.Kind() {
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			fill(v.Elem(), name)
		case reflect.Struct:
			for i := range v.NumField() {
				name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
				fill(v.Field(i), name)
			}
		case reflect.Slice:
			if v.Type() == reflect.TypeFor[json.RawMessage]() {
				return
			}
			v.Set(reflect.MakeSlice(v.Type(), 2, 2))
			fill(v.Index(0), name)
			fill(v.Index(1), name)
		case reflect.String:
			switch v.Type() {
			case reflect.TypeFor[string]():
				v.SetString(name)
			case reflect.TypeFor[Op]():
				v.SetString(string(RunBash))
			}
			if strings.HasSuffix(name, "_sha256") || name == "before" || name == "after" {
				n++
				v.SetString(SHA256([]byte{byte(n)}))
			}
		}
	}
	var a Action
	fill(reflect.ValueOf(&a).Elem(), "")
	before, err := json.Marshal(a)
	if err != nil || n < 11 {
		t.Fatalf("%d digests, %v", n, err)
	}
	shown, left := a.Shown()
	raw, err := json.Marshal(shown)
	if err != nil {
		t.Fatal(err)
	}
	if digests := regexp.MustCompile(`[0-9a-f]{64}`).FindAll(raw, -1); len(digests) > 0 || len(left) != n || strings.Count(string(raw), Salted) != n {
		t.Fatalf("%d of %d left out, %d shown: %s", len(left), n, len(digests), raw)
	}
	if now, _ := json.Marshal(a); string(now) != string(before) {
		t.Errorf("the action itself was changed: %s", now)
	}
	var read Action
	if err := json.Unmarshal(raw, &read); err != nil {
		t.Fatal(err)
	}
	whole, ok := read.Whole(left)
	if raw, _ := json.Marshal(whole); !ok || string(raw) != string(before) {
		t.Errorf("put together: %v\n got %s\nwant %s", ok, raw, before)
	}
	for name, wrong := range map[string][]string{"none": nil, "one too few": left[1:], "one too many": append(left[:n:n], left[0])} {
		if _, ok := read.Whole(wrong); ok {
			t.Errorf("put together with %s", name)
		}
	}
	if shown, left := (Action{Op: ReadFiles, Files: []File{{Path: "a"}}}).Shown(); len(left) > 0 || shown.Files[0].Before != "" {
		t.Errorf("%+v, %v: what is empty says nothing", shown, left)
	}
}

// Nobody without the salt can confirm a guess of a result.
func TestResultDigest(t *testing.T) {
	result := []byte(`"hunter2correct"`)
	salt, other := NewSalt(), NewSalt()
	p := Permit{Salt: salt[:]}
	got := p.ResultDigest(result)
	if want := SHA256(append(salt[:], result...)); got != want {
		t.Errorf("got %s, want SHA-256(salt || result) = %s", got, want)
	}
	if got == SHA256(result) || got == (Permit{Salt: other[:]}).ResultDigest(result) {
		t.Errorf("%s is of the result alone", got)
	}
}
