package authority

import (
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"cal/approval/client"
	"cal/audit"
	"cal/audit/witness"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// WitnessName is the name of the key by which an authority cosigns.
const WitnessName = "cal/authority"

// openWitness makes the built-in witness. Its key is not sealed, for nobody is asked:
// it says only that a checkpoint continues the one before it.
func (a *Authority) openWitness() error {
	key, err := keyfile.LoadOrMake(filepath.Join(a.cfg.Dir, "witness.key"))
	if err != nil {
		return err
	}
	a.witness = &witness.Witness{Name: WitnessName, Key: key, Store: a.store, Now: a.cfg.Now, Refused: a.contradicted}
	return nil
}

// contradicted records that a log's key has signed two histories: both stay as proof.
func (a *Authority) contradicted(origin string, kept, signed []byte, why error) {
	data, err := nucleus.Canonical(map[string]string{"origin": origin, "why": why.Error(), "kept": string(kept), "signed": string(signed)})
	if err != nil {
		return // not UTF-8, so the key has signed no checkpoint
	}
	// It is refused, whether that can be recorded or not.
	_ = a.cfg.Recorder.Record(nucleus.Entry{Time: a.cfg.Now().UTC().Format(time.RFC3339Nano), Kind: nucleus.KindLogFork, Actor: WitnessName, Data: data})
}

// RegisterLog makes the key of a log known: the first word counts.
func (a *Authority) RegisterLog(key string) error {
	if len(key) > 1000 {
		return nucleus.Errorf(nucleus.KindInvalid, "a verifier key of %d bytes", len(key))
	}
	origin, _, _ := strings.Cut(key, "+")
	if err := audit.CheckKey(key); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "%v", err)
	}
	if err := a.roomToAsk(); err != nil {
		return err
	}
	known, err := a.store.addLog(origin, key)
	if err != nil {
		return unavailable(err)
	}
	if known != key {
		return nucleus.Errorf(nucleus.KindConflict, "log %s is known with the key %s, now %s (if the log was begun anew: nucleus-authority witness --forget %s)", origin, known, key, origin)
	}
	return nil
}

// Witnessed is the newest checkpoint of a log that was cosigned and kept.
func (a *Authority) Witnessed(origin string) (client.Witnessed, error) {
	key, signed, err := a.store.Log(origin)
	if errors.Is(err, witness.ErrUnknownLog) {
		return client.Witnessed{}, nucleus.Errorf(nucleus.KindNotFound, "there is no log %q here", origin)
	}
	return client.Witnessed{Origin: origin, Key: key, Checkpoint: string(signed), Witness: a.witness.PublicKey()}, unavailable(err)
}

// ForgetLog gives up what is known of a log: the next one of this name begins anew.
// That is recorded first, with the checkpoint that goes.
func (a *Authority) ForgetLog(origin string) error {
	known, err := a.Witnessed(origin)
	if err != nil {
		return err
	}
	data, err := nucleus.Canonical(known)
	if err != nil {
		return err
	}
	err = a.cfg.Recorder.Record(nucleus.Entry{Time: a.cfg.Now().UTC().Format(time.RFC3339Nano), Kind: nucleus.KindLogForget, Actor: actor, Data: data})
	if err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot record that it forgets log %s: %v", origin, err)
	}
	return unavailable(a.store.forgetLog(origin))
}

// witnessRoutes are those of the built-in witness. add-checkpoint is C2SP's.
func (a *Authority) witnessRoutes(mux *http.ServeMux, route func(string, role, func(*http.Request, int) (any, error))) {
	mux.HandleFunc("POST "+client.WitnessPrefix+"/add-checkpoint", func(w http.ResponseWriter, r *http.Request) {
		if _, err := a.allowed(r, asker); err != nil {
			answer(w, nil, err)
			return
		}
		a.witness.ServeHTTP(w, r)
	})
	route("POST "+client.WitnessPrefix+"/logs", asker, func(r *http.Request, _ int) (any, error) {
		var log client.Log
		if err := read(r, maxBody, &log); err != nil {
			return nil, err
		}
		return struct{}{}, a.RegisterLog(log.Key)
	})
	route("GET "+client.WitnessPrefix+"/checkpoint", asker, func(r *http.Request, _ int) (any, error) {
		return a.Witnessed(r.URL.Query().Get("origin"))
	})
	route("DELETE "+client.WitnessPrefix+"/checkpoint", decider, func(r *http.Request, _ int) (any, error) {
		return struct{}{}, a.ForgetLog(r.URL.Query().Get("origin"))
	})
}
