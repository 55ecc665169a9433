-- What the replaced system made of an empty database, so that the tests have one to take over.
-- Two traits differ from its API: ids are 32 bits wide, and the words of the enums are in capitals.
CREATE TABLE alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
);

INSERT INTO alembic_version VALUES ('accf7da576c7');

CREATE TYPE incidentstatus AS ENUM ('OPEN', 'IN_PROGRESS', 'RESOLVED', 'CLOSED');

CREATE TYPE incidentsource AS ENUM ('OPERATOR', 'MONITORING', 'PARTNER');

-- No check on the description: a blank one was taken, and one of any length.
CREATE TABLE incidents (
    id          serial PRIMARY KEY,
    description varchar NOT NULL,
    status      incidentstatus NOT NULL,
    source      incidentsource NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX ix_incidents_id ON incidents (id);
