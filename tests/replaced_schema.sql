-- The schema of the replaced system, so that the tests have a database to take over. Its ids have 32
-- bits, and the words of its enums are upper case, although its API spoke lower case.
CREATE TABLE alembic_version (
    version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY
);

INSERT INTO alembic_version VALUES ('accf7da576c7');

CREATE TYPE incidentstatus AS ENUM ('OPEN', 'IN_PROGRESS', 'RESOLVED', 'CLOSED');

CREATE TYPE incidentsource AS ENUM ('OPERATOR', 'MONITORING', 'PARTNER');

-- There is no check on the description, so it may be blank and of any length.
CREATE TABLE incidents (
    id          serial PRIMARY KEY,
    description varchar NOT NULL,
    status      incidentstatus NOT NULL,
    source      incidentsource NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX ix_incidents_id ON incidents (id);
